"""`crate-mae pretrain` and `crate-mae resume`: train a model on images without labels."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token

from crate_mae.errors import UserError

if TYPE_CHECKING:
    from crate_mae.training.run import Run
else:
    Run = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


def _as_text(_type: Any, tokens: Sequence[Token]) -> str:
    return tokens[0].value


def _as_size(_type: Any, tokens: Sequence[Token]) -> int | tuple[int, int]:
    """Understand 224 or 128x192 on the command line, a number or a list of two in a file."""
    words = [word for token in tokens for word in token.value.lower().split("x")]
    if not 1 <= len(words) <= 2 or not all(word.isdigit() for word in words):
        raise ValueError("an image size is a number of pixels, or HEIGHTxWIDTH")
    return int(words[0]) if len(words) == 1 else (int(words[0]), int(words[1]))


def _as_setting(_type: Any, tokens: Sequence[Token]) -> Any:
    import yaml

    return yaml.safe_load(tokens[0].value)


# From Python, data may also be a torch.utils.data.Dataset: a type that only an import of torch could name.
Data = Annotated[Any, Parameter(converter=_as_text, n_tokens=1)]
ImageSize = Annotated[int | tuple[int, int] | None, Parameter(converter=_as_size, n_tokens=1, negative=())]
Numbers = Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, negative=())]
Names = Annotated[tuple[str, ...] | str | None, Parameter(consume_multiple=True, negative="--no-trackers")]
_NO_OPTIONS = ("out", "recipe", "dry_run", "quiet")  # of a run: what it does not remember
Setting = Annotated[Any, Parameter(converter=_as_setting, n_tokens=1)]


def pretrain(
    data: Data,
    *,
    out: Path | str,
    recipe: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    min_lr: float = 0.0,
    warmup_epochs: float | None = None,
    weight_decay: float = 0.05,
    clip_grad: float = 1.0,
    mask_ratio: float = 0.75,
    mask_tokens: Literal["encoder", "decoder"] | None = None,
    norm_pix_loss: bool = False,
    drop_path: float = 0.0,
    model_settings: dict[str, Setting] | None = None,
    image_size: ImageSize = None,
    channels: int | None = None,
    mean: Numbers = None,
    std: Numbers = None,
    min_crop: float = 0.2,
    flip: bool = True,
    val: Data = None,
    seed: int = 0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    accumulation: int = 1,
    compile: bool = False,  # noqa: A002  # PyTorch's own name for it
    grad_checkpointing: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    max_bad: float = 0.01,
    checkpoint_minutes: float = 10.0,
    checkpoint_epochs: int | None = None,
    log_steps: int | None = None,
    monitor_steps: int | None = None,
    trackers: Names = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a masked autoencoder on images; labels are not needed.

    Everything is checked before a file is written. If `out` is a run already, it is resumed where it stopped: options
    left at their defaults are then taken from that run, and others must be the same.

    Args:
        data: A folder of images, .parquet, .tar shards, hf:name, torchvision:CIFAR10, or digits.
        out: The folder of the run.
        recipe: Options that were tried together, from `crate-mae recipes`; those given beside it win.
        model: A name from `crate-mae models`. By default the one made for images of this size.
        epochs: Passes over the training images. 100 if neither --epochs nor --steps is given.
        steps: Optimizer steps, instead of epochs.
        batch_size: Images per step, over all processes and micro-batches. By default 256, less for little data.
        lr: Learning rate per 256 images; it is scaled by batch_size / 256. By default from width and batch.
        min_lr: Learning rate at the end of the cosine, per 256 images.
        warmup_epochs: Epochs of linear warm-up. By default 5% of the run.
        weight_decay: Decoupled weight decay of AdamW; norms, biases and tokens are spared.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        mask_ratio: Share of hidden patches.
        mask_tokens: Where mask tokens come in. By default as the model's name says.
        norm_pix_loss: Predict patches normalised by their own mean and standard deviation.
        drop_path: Stochastic depth of the encoder's last layer.
        model_settings: Any other setting of the model, such as --model-settings.threshold 0.1
        image_size: Pixels, or HEIGHTxWIDTH. By default the model's.
        channels: Channels to convert images to. By default those of the images.
        mean: Per channel, of pixels in [0, 1]. By default ImageNet's for 3 channels, otherwise measured.
        std: Per channel, likewise.
        min_crop: Smallest share of an image that a random crop takes.
        flip: Mirror half of the images; wrong for writing.
        val: Other data to measure on. By default 5% of the images, at most 512, are held out.
        seed: Of the weights, the order, the crops and the masks.
        precision: By default whichever is faster here, measured.
        accumulation: Micro-batches per step, to save memory.
        compile: Compile the model with torch.compile.
        grad_checkpointing: Compute layers again in the backward pass, to save memory.
        workers: Processes that load images. By default one less than there are cores, at most 8.
        threads: CPU threads that compute. By default PyTorch's choice.
        max_bad: Largest share of unreadable images before the run stops.
        checkpoint_minutes: Save at least this often.
        checkpoint_epochs: Save every so many epochs. By default as many as take about a minute.
        log_steps: Steps between rows of metrics.csv. By default about 200 rows, and at most 50 steps.
        monitor_steps: Steps between measurements and pictures of held-out images. By default 20 times in a run, but
            not more than once in an epoch or 100 steps.
        trackers: Such as tensorboard or wandb. By default TensorBoard if installed; --no-trackers for none.
        dry_run: Only check and show the plan.
        quiet: Show nothing.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be mended.
        RunStopped: after Ctrl-C or SIGTERM, when everything has been saved.
    """
    options = {key: value for key, value in locals().items() if key not in _NO_OPTIONS}
    from crate_mae.training.recipes import with_recipe
    from crate_mae.training.start import start

    defaults = pretrain_defaults()
    if recipe is not None:
        options = with_recipe(recipe, options, defaults)
    return start("pretrain", Path(out), options, defaults, dry_run=dry_run, quiet=quiet)


def pretrain_defaults() -> dict[str, Any]:
    """What the options of `pretrain` are if nobody says otherwise: those that a run remembers, by name."""
    parameters = inspect.signature(pretrain).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _NO_OPTIONS}


def resume(run: Path | str, *, quiet: bool = False) -> Run:
    """Go on with a run that was stopped, of pretraining or fine-tuning, from its newest checkpoint.

    On the same machine the weights will be those of a run that was never stopped; on a CPU, bit for bit.

    Args:
        run: The folder of the run.
        quiet: Show nothing.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: if this is no run, or a reason to stop that can be mended.
        RunStopped: after Ctrl-C or SIGTERM, when everything has been saved.
    """
    from crate_mae.commands.finetune import finetune
    from crate_mae.training.config import FinetuneConfig
    from crate_mae.training.run_directory import RunDirectory

    config = RunDirectory(Path(run)).existing_config()
    if config is None:
        raise UserError(
            f"{run} is not a run: it has no config.yaml. Start one with: crate-mae pretrain DATA --out {run}"
        )
    options = dataclasses.asdict(config)
    if isinstance(config, FinetuneConfig):
        return finetune(options.pop("model"), out=Path(run), quiet=quiet, **options)
    return pretrain(options.pop("data"), out=Path(run), quiet=quiet, **options)
