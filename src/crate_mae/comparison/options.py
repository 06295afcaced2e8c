"""The options of a comparison, and the budget of each entry."""

import dataclasses
import itertools
import math
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import Annotated, Any, Literal, no_type_check

from cyclopts import Parameter

from crate_mae.data.documents import parse_yaml
from crate_mae.errors import UserError
from crate_mae.models.config import HeadPooling, check_settings
from crate_mae.models.presets import preset
from crate_mae.options import (
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    JSON_NEEDS_DRY_RUN,
    PLAN_AS_JSON,
    Data,
    Mistakes,
    OutputPath,
    Pixels,
    check_ranges,
    option,
    same_as,
    saved_values,
)
from crate_mae.training.options import PretrainOptions

Models = Annotated[tuple[str, ...], Parameter(negative=())]
_FORMS = "A budget is steps=N, minutes=N or flops=N, such as steps=2000, minutes=30 or flops=1e15."
_KINDS = ("steps", "minutes", "flops")


@dataclass(frozen=True)
class Budget:
    """What each entry may spend on the search for its learning rate and one final run together.

    Attributes:
        kind: optimizer steps, minutes of this machine, or floating-point operations of training.
        amount: how many of them.
    """

    kind: Literal["steps", "minutes", "flops"]
    amount: float

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}" if self.amount >= 1e6 else f"{self.kind}={self.amount:.10g}"


def parse_budget(text: str) -> Budget:
    """Parse "steps=2000", "minutes=30" or "flops=1e15".

    Raises:
        UserError: for any other text.
    """
    kind, _, number = str(text).partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if kind not in _KINDS or not math.isfinite(amount) or amount <= 0:
        raise UserError(f'--budget "{text}" is not a valid budget. {_FORMS}')
    if kind == "steps" and not amount.is_integer():
        raise UserError(f'--budget "{text}" is not a whole number of steps. {_FORMS}')
    return Budget(kind, amount)


def alternatives(model: str) -> list[str]:
    """The networks that "NAME?depth=2|3&embed_dim=96" stands for, each with one value for each setting."""
    name, _, query = model.partition("?")
    if "|" not in query:
        return [model]
    pairs = [pair.partition("=") for pair in query.split("&")]
    values = [[f"{key}{equals}{value}" for value in listed.split("|")] for key, equals, listed in pairs]
    return [f"{name}?{'&'.join(chosen)}" for chosen in itertools.product(*values)]


def name_and_settings(model: str) -> tuple[str, dict[str, Any]]:
    """The parts of "NAME?depth=3&embed_dim=96".

    Raises:
        UserError: for a setting without a value, or one that is given twice.
    """
    name, _, query = model.partition("?")
    settings: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        key = key.replace("-", "_")
        if not equals or not value:
            raise UserError(
                f'{model}: "{pair}" is not a setting. Settings are written as in NAME?depth=3&embed_dim=96.'
            )
        if key in settings:
            raise UserError(f"{model} has the setting {key} twice.")
        settings[key] = parse_yaml(value, model)
    return name, settings


@no_type_check  # values come from users: `__post_init__` reports all wrong ones together
@dataclass(frozen=True)
class CompareOptions:
    """The options of `crate_mae.compare`.

    Raises:
        UserError: with all mistakes that can be found without the images.
    """

    models: Models = option(
        MISSING,
        'Two or more names from `crate-mae models`; with individual settings as in "NAME?depth=3&embed_dim=96". With '
        'several values, as in "NAME?depth=2|3|4", the search also chooses among these networks.',
    )
    _: KW_ONLY
    train: Data = option(
        MISSING, "Images for pretraining and for fitting the probes, in any form that `crate-mae pretrain` takes."
    )
    val: Data = option(MISSING, "Images to evaluate on.")
    budget: str = option(
        MISSING,
        "Budget of each entry, including the search: steps=N, minutes=N on this machine, or flops=N of training.",
    )
    out: OutputPath = option(
        MISSING, "Folder of the comparison; the same command continues one that is there.", saved=False
    )
    batch_size: int = same_as(
        PretrainOptions, "batch_size", "Images per step. By default, 256, or fewer for small data sets."
    )
    mask_ratio: float = same_as(PretrainOptions, "mask_ratio")
    norm_pix_loss: bool = same_as(PretrainOptions, "norm_pix_loss")
    seeds: int = option(
        1,
        "Number of final runs of each entry, all with the same number of steps; the budget covers the first.",
        AT_LEAST_1,
    )
    lr_search: int = option(
        3,
        "Number of learning rates to try for each network: first its default, then three times or a third of the best "
        "so far, in the direction in which the loss falls, and finally one between the best and its neighbour. 1 skips "
        "the search.",
        AT_LEAST_1,
    )
    search_share: float = option(
        0.3, "Share of the budget for the search, divided equally among the tries.", BETWEEN_0_AND_1
    )
    probe_layer: int = option(
        None, "Encoder layer of the features, from 0, or negative from the end. By default, the last."
    )
    pooling: HeadPooling = option(None, "Class token, mean of patches, or both. By default, as in `crate-mae eval`.")
    precision: Literal["auto", "float32", "bfloat16"] = same_as(
        PretrainOptions,
        "precision",
        "Precision of matrix products; auto takes float32 or bfloat16, whichever is faster for each entry as measured "
        "on this machine.",
    )
    workers: int = same_as(PretrainOptions, "workers")
    threads: int = same_as(PretrainOptions, "threads")
    image_size: Pixels = option(None, "Pixels, or HEIGHTxWIDTH. By default, the models', if they agree.")
    min_crop: float = same_as(PretrainOptions, "min_crop")
    flip: bool = same_as(PretrainOptions, "flip")
    dry_run: bool = option(
        False, "Check the options, time the models and print the plan, but do not train.", saved=False
    )
    quiet: bool = option(False, "Print nothing.", saved=False)
    json: bool = option(False, PLAN_AS_JSON, saved=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        mistakes = Mistakes()
        if len(self.models) < 2:
            named = f"only {self.models[0]}" if self.models else "none"
            mistakes.append(f"A comparison needs at least two models, but {named} was named.")
        seen: list[tuple[str, dict[str, Any]]] = []
        numbers = {model: len(alternatives(model)) for model in self.models}
        if len(set(numbers.values())) > 1:
            listed = ", ".join(f"{number} with {model}" for model, number in numbers.items())
            mistakes.append(
                f"The search would choose among different numbers of networks ({listed}), which favours some entries: "
                "give the same number of alternatives for each."
            )
        for model in itertools.chain.from_iterable(map(alternatives, self.models)):
            with mistakes.collected():
                name, settings = name_and_settings(model)
                config = preset(name)
                check_settings(type(config), settings)
                config.replace(**settings)
                if (name, settings) in seen:
                    raise UserError(f"{model} is named twice: it would be compared with itself.")
                seen.append((name, settings))
        with mistakes.collected():
            parse_budget(self.budget)
        mistakes += check_ranges(self)
        if self.json and not self.dry_run:
            mistakes.append(JSON_NEEDS_DRY_RUN)
        mistakes.raise_if_any()

    def saved(self, train: str, val: str) -> dict[str, Any]:
        """The options as they are written to a file, with names that open the data from any folder."""
        values = {**saved_values(self), "train": train, "val": val}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def pretraining(self, model: str) -> PretrainOptions:
        """The options of `crate_mae.pretrain` for a run of one step of a model, named with its settings.

        No tracker is used, because a comparison writes its own tables.
        """
        name, own = name_and_settings(model)
        shared = {item.name for item in dataclasses.fields(PretrainOptions)} - {"val"}
        given = {name: value for name, value in saved_values(self).items() if name in shared}
        return PretrainOptions(
            self.train, **given, model=name, model_settings=own, steps=1, out="", trackers=(), quiet=True
        )
