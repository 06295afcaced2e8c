"""The options of `pretrain` and `finetune`: each is declared once, with its default, help, range and choices.

The command line, the Python functions and `config.yaml` are all made from these dataclasses. An option whose default is
None is open: `resolve` fills it in from the data and the machine, and in a run it has its declared type.
"""

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, no_type_check

from cyclopts import Parameter, Token

from crate_mae.data.documents import parse_yaml
from crate_mae.data.files import PYTHON_OBJECT
from crate_mae.data.numbers import MAX_BAD, MIN_CROP, MOST_THREADS
from crate_mae.models.config import MASK_RATIO, HeadPooling
from crate_mae.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    BETWEEN_0_AND_1,
    FROM_0_TO_1,
    GIVEN,
    PLAN_AS_JSON,
    POSITIVE,
    SHARE,
    Data,
    Mistakes,
    Numbers,
    Pixels,
    Range,
    as_words,
    check_ranges,
    option,
    option_name,
    same_as,
)


def _as_setting(_type: Any, tokens: Sequence[Token]) -> Any:
    return parse_yaml(tokens[0].value, tokens[0].value)


Names = Annotated[tuple[str, ...] | str, Parameter(consume_multiple=True, negative="--no-trackers")]
Setting = Annotated[Any, Parameter(converter=_as_setting, n_tokens=1)]


LENGTHS = ("epochs", "steps", "minutes")  # each sets the length of a run
# What fits a run of one length and folder, and the call that began it, but not another run of the same kind.
OF_ONE_LENGTH = (*LENGTHS, "out", "warmup_epochs", "monitor_steps", "checkpoint_epochs", "dry_run", "quiet", "json")
# Settings of a model that are options of their own, by the names of the settings.
MODEL_OPTIONS = {
    **{name: name for name in ("image_size", "mean", "std", "mask_tokens", "norm_pix_loss", "drop_path")},
    "in_chans": "channels",
}
TO_1024 = Range(lambda x: 1 <= x <= MOST_THREADS, f"from 1 to {MOST_THREADS:,}")
FROM_0_TO_1024 = Range(lambda x: 0 <= x <= MOST_THREADS, f"from 0 to {MOST_THREADS:,}")


@no_type_check  # values come from users: `check` reports all wrong ones together
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that `pretrain` and `finetune` share.

    `accumulation`, `compile`, `grad_checkpointing` and `threads` change the last bits of the weights, not what is
    computed, and so count as speed. Exact resuming needs them unchanged.

    Attributes:
        command: the command, and the function of `crate_mae`, that takes these options.
        usual_epochs: length of a run by default.
        usual_warmup: the share of a run that warms up by default.
        origins: no option, but where those come from that are not at their defaults, or were given with these; see
            `origin`. None where it is not known.
    """

    command: ClassVar[str]
    usual_epochs: ClassVar[int]
    usual_warmup: ClassVar[float]

    out: Path | str = option(
        MISSING, "Folder of the run. One that is there is continued, with the same options.", saved=False
    )
    epochs: int = option(
        None,
        "Passes over the training images. By default, without --steps or --minutes, 100 for pretraining and 50 for "
        "fine-tuning.",
        AT_LEAST_1,
        saved=False,
    )
    steps: int = option(None, "Optimizer steps, instead of epochs.", AT_LEAST_1)
    minutes: float = option(
        None,
        "Intended duration of the run in minutes, instead of epochs. The number of steps is chosen from the measured "
        "speed of this machine; by default, so are the batch size and (for images of more than 176 pixels) the model.",
        POSITIVE,
        saved=False,
    )
    batch_size: int = option(
        None,
        "Images per step, over all processes and micro-batches. By default, 256, or fewer for small data sets.",
        AT_LEAST_1,
    )
    lr: float = option(None, "Learning rate per 256 images; it is scaled by batch_size / 256.", POSITIVE)
    min_lr: float = option(0.0, "Final learning rate of the cosine schedule, per 256 images.", AT_LEAST_0)
    warmup_epochs: float = option(
        None, "Epochs of linear warm-up. By default, 5% of the run in pretraining and 10% in fine-tuning.", AT_LEAST_0
    )
    weight_decay: float = option(
        0.05, "Decoupled weight decay of AdamW; norms, biases and tokens are exempt.", AT_LEAST_0
    )
    clip_grad: float = option(1.0, "Maximum gradient norm; 0 turns clipping off.", AT_LEAST_0)
    drop_path: float = option(
        0.0,
        "Stochastic depth: probability of skipping the encoder's last layer in training; it is smaller for earlier "
        "layers.",
        BELOW_1,
    )
    image_size: Pixels = option(None, "Pixels, or HEIGHTxWIDTH. By default, the model's.")
    min_crop: float = option(MIN_CROP, "Smallest share of an image's area that a random crop covers.", SHARE)
    flip: bool = option(True, "Mirror half of the images at random; turn off for images of text.")
    seed: int = option(0, "Seed for weights, data order, crops and masks.", AT_LEAST_0)
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Precision of matrix products; auto takes float32 or bfloat16, whichever is faster as measured here.",
    )

    accumulation: int = option(1, "Number of micro-batches per step, to save memory.", AT_LEAST_1, speed=True)
    compile: bool = option(False, "Compile the model with torch.compile.", speed=True)
    grad_checkpointing: bool = option(
        False, "Recompute layers in the backward pass, to save memory.", speed=True, added_later=True
    )
    workers: int = option(
        None,
        "Number of processes that load images; with 0, the process that trains does. By default, one less than the "
        "number of cores, at most 8.",
        FROM_0_TO_1024,
        speed=True,
    )
    threads: int = option(
        None, "Number of CPU threads for computation. By default, PyTorch's choice.", TO_1024, speed=True
    )
    max_bad: float = option(
        MAX_BAD, "Maximum share of unreadable images; with more, the run stops.", FROM_0_TO_1, speed=True
    )
    checkpoint_minutes: float = option(10.0, "Maximum minutes between checkpoints.", POSITIVE, speed=True)
    checkpoint_epochs: int = option(
        None, "Epochs between checkpoints. By default, as many as take about a minute.", AT_LEAST_1, speed=True
    )
    log_steps: int = option(
        None,
        "Steps between rows of metrics.csv. By default, for about 200 rows, but at most 50 steps.",
        AT_LEAST_1,
        speed=True,
    )
    monitor_steps: int = option(
        None,
        "Steps between evaluations on held-out images. By default, a twentieth of the run, but at least one epoch or "
        "100 steps, whichever is less.",
        AT_LEAST_1,
        speed=True,
    )
    trackers: Names = option(
        None,
        "Experiment trackers, such as tensorboard or wandb. By default, TensorBoard if installed; --no-trackers for "
        "none.",
        speed=True,
    )
    dry_run: bool = option(False, "Check the options and print the plan, but do not train.", saved=False)
    quiet: bool = option(False, "Print nothing.", saved=False)
    json: bool = option(False, PLAN_AS_JSON, saved=False)
    origins: dict[str, str] | None = option(None, "", saved=False)

    @property
    def inseparable(self) -> int:
        """Number of neighbouring images that must stay in one micro-batch."""
        return 1

    @property
    def is_from_python(self) -> bool:
        """Whether some data of a run is a Python object, which only a call from Python can give to it again."""
        data = [getattr(self, item.name) for item in dataclasses.fields(self) if item.type is Data]
        return any(isinstance(name, str) and name.startswith(PYTHON_OBJECT) for name in data)

    @property
    def resume_command(self) -> str:
        """What continues a run: a command, or the call from Python."""
        if self.is_from_python:
            return f"the same call of crate_mae.{self.command} from Python"
        return f"crate-mae resume {shlex.quote(str(self.out))}"

    @property
    def resume_with_other_data(self) -> str:
        """What continues a run on data that has changed, which no call from Python does."""
        return "start a new run" if self.is_from_python else f"{self.resume_command} --data-changed"

    def given(self) -> dict[str, Any]:
        """The options that were given, or are not at their defaults. Data, any Python object, is not compared."""
        values = {item.name: (getattr(self, item.name), item.default) for item in own_first(type(self))}
        return {
            name: value
            for name, (value, default) in values.items()
            if name in (self.origins or {})
            or (value is not default if default in (None, MISSING) else value != default)
        }

    def filled_from(self: "OptionsT", existing: "RunOptions") -> "OptionsT":
        """These options, with those that were not given taken from a run that exists."""
        given = self.given()
        kept = {name: getattr(existing, name) for name in saved_options(type(self)) if name not in given}
        if {"epochs", "minutes"} & given.keys() and "steps" not in given:
            kept["steps"] = None
        stored = [name for name, value in kept.items() if value is not None]
        origins = dict.fromkeys(stored, f"the run in {existing.out}") | (self.origins or {})
        return dataclasses.replace(self, **kept, origins=origins)


OptionsT = TypeVar("OptionsT", bound=RunOptions)


@no_type_check
@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """The options of `crate_mae.pretrain`."""

    command: ClassVar[str] = "pretrain"
    usual_epochs: ClassVar[int] = 100
    usual_warmup: ClassVar[float] = 0.05

    data: Data = field(  # `field`, not `option`: type checkers would not see that it may be given by position
        kw_only=False,
        metadata=option(
            MISSING, "A folder of images, .parquet, .tar shards, hf:name, torchvision:CIFAR10, or digits."
        ).metadata,
    )
    recipe: str | None = option(
        None, "A tested set of options (see `crate-mae recipes`); options on the command line override it.", saved=False
    )
    model: str = option(None, "A name from `crate-mae models`. By default, chosen from the image size.")
    lr: float = same_as(
        RunOptions,
        "lr",
        "Learning rate per 256 images; it is scaled by batch_size / 256. By default, chosen from the model (width, "
        "initialisation, kind of layers) and the batch size.",
    )
    init_from: str | Path | None = option(
        None,
        "A trained model to start from: a run, a bundled model, hf:user/name ... Its weights are used where they fit. "
        "Without --model, or if --model is its name, its settings are kept; the patch size is adapted to the images.",
        added_later=True,
    )
    val: Data = option(
        None,
        "Images to evaluate on; of more than 512, a fixed sample. By default, 5% of the images, at most 512, are held "
        "out.",
    )
    model_settings: dict[str, Setting] = option(None, "Other model settings, such as --model-settings.threshold 0.1")
    image_size: Pixels = same_as(
        RunOptions,
        "image_size",
        "Pixels, or HEIGHTxWIDTH. By default, the model's; with --init-from and no other --model, as suits the images.",
    )
    channels: int = option(None, "Number of channels to convert images to. By default, as in the images.", AT_LEAST_1)
    mean: Numbers = option(
        None, "Mean of each channel, for pixels in [0, 1]. By default, ImageNet's for 3 channels, otherwise measured."
    )
    std: Numbers = option(None, "Standard deviation of each channel, as for --mean.")
    mask_ratio: float = option(MASK_RATIO, "Share of patches to hide.", BETWEEN_0_AND_1)
    mask_tokens: Literal["encoder", "decoder"] = option(
        None, "Where mask tokens enter the model. By default, as in the named model."
    )
    norm_pix_loss: bool = option(False, "Predict patches normalised by their own mean and standard deviation.")


@no_type_check
@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The options of `crate_mae.finetune`."""

    command: ClassVar[str] = "finetune"
    usual_epochs: ClassVar[int] = 50
    usual_warmup: ClassVar[float] = 0.1

    model: str | Path = field(
        kw_only=False,
        metadata=option(
            MISSING,
            "A run folder, a folder with model.safetensors and config.json, hf:user/name, or a name from "
            "`crate-mae models`, which means random initialisation.",
        ).metadata,
    )
    train: Data = option(
        MISSING,
        "Labelled images: a folder with a subfolder for each class, .parquet, .tar shards, hf:name, digits:train ...",
    )
    val: Data = option(MISSING, "Labelled images of the same classes, to evaluate on and to select the best model.")
    minutes: float = same_as(
        RunOptions,
        "minutes",
        "Intended duration of the run in minutes, instead of epochs. The number of steps is chosen from the measured "
        "speed of this machine; by default, so is the batch size.",
    )
    labels: float = option(1.0, "Share of the training images of each class to use; the seed determines which.", SHARE)
    pooling: HeadPooling = option("cls+mean", "Input of the head: the class token, the mean over patches, or both.")
    lr: float = same_as(
        RunOptions,
        "lr",
        "Learning rate of the head per 256 images; it is scaled by batch_size / 256. By default, 1.5e-3 x "
        "sqrt(256 / batch_size).",
    )
    layer_decay: float = option(
        0.75, "Layer-wise decay: learning rate of each layer divided by that of the next layer.", SHARE
    )
    mixup: float = option(0.8, "Strength of Mixup (the parameter of a Beta distribution); 0 turns it off.", AT_LEAST_0)
    cutmix: float = option(1.0, "Strength of CutMix, as for Mixup; each step uses only one of the two.", AT_LEAST_0)
    rand_augment: str = option("rand-m9-mstd0.5-inc1", 'timm\'s RandAugment policy; "" turns it off.')
    label_smoothing: float = option(0.1, "Share of each target that is spread over all classes.", BELOW_1)
    ema: float = option(
        0.9999,
        "Decay of the exponential moving average of the weights; the averaged model is evaluated and saved. The decay "
        "is smaller at the beginning; 0 turns averaging off.",
        BELOW_1,
    )
    drop_path: float = same_as(RunOptions, "drop_path", default=0.1)
    image_size: Pixels = option(
        None, "Pixels, or HEIGHTxWIDTH. By default, the model's; position embeddings are interpolated."
    )
    seed: int = same_as(
        RunOptions, "seed", "Seed for random initialisation, choice of labels, data order and augmentation."
    )
    monitor_steps: int = same_as(
        RunOptions,
        "monitor_steps",
        "Steps between validations. By default, one epoch, or several if --val has more images than --train.",
    )

    @property
    def inseparable(self) -> int:
        """Two where images are mixed, each with its neighbour."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1


def given_words(options: RunOptions, without: Collection[str]) -> list[str]:
    """The options that were given on the command line, as words of another command line, without some of them."""
    given = [name for name, where in (options.origins or {}).items() if where == GIVEN and name not in without]
    return as_words({name: getattr(options, name) for name in given})


def given_settings(options: Any) -> dict[str, Any]:
    """The settings of a model for which options have a value, by the names of the settings."""
    values = {setting: getattr(options, name, None) for setting, name in MODEL_OPTIONS.items()}
    return {setting: value for setting, value in values.items() if value is not None}


def own_first(kind: Any) -> list[dataclasses.Field]:
    """The options of a command: first those that only it has, then the shared ones."""
    shared = [item.name for item in dataclasses.fields(RunOptions)]
    options = [item for item in dataclasses.fields(kind) if item.name != "origins"]
    return sorted(options, key=lambda item: item.name in shared)


def saved_options(kind: type[RunOptions], *, speed: bool | None = None) -> list[str]:
    """The names of the options that a run keeps: all, or those that decide the result (False) or the others (True)."""
    kept = [item for item in own_first(kind) if item.metadata["saved"]]
    return [item.name for item in kept if speed in (None, item.metadata["speed"])]


def check(options: RunOptions) -> Mistakes:
    """Check each option by itself."""
    mistakes = check_ranges(options)
    lengths = [option_name(name) for name in LENGTHS if getattr(options, name) is not None]
    if len(lengths) > 1:
        mistakes.append(f"{' and '.join(lengths)} both set the length of the run: give one of them.")
    return mistakes
