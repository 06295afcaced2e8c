"""The options of a comparison, and the budget of each entry."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from crate_mae.errors import UserError
from crate_mae.models.presets import preset
from crate_mae.training.options import PretrainOptions

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
    kind, _, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if kind not in _KINDS or not math.isfinite(amount) or amount <= 0:
        raise UserError(f'--budget "{text}" is not a valid budget. {_FORMS}')
    if kind == "steps" and not amount.is_integer():
        raise UserError(f'--budget "{text}" is not a whole number of steps. {_FORMS}')
    return Budget(kind, amount)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `crate_mae.compare`, which explains them.

    Raises:
        UserError: with all mistakes that can be found without the images.
    """

    models: tuple[str, ...]
    train: Any
    val: Any
    budget: str
    batch_size: int | None
    mask_ratio: float
    norm_pix_loss: bool
    seeds: int
    lr_search: int
    search_share: float
    probe_layer: int | None
    pooling: Literal["cls", "mean", "cls+mean"] | None
    precision: Literal["auto", "float32", "bfloat16"]
    workers: int | None
    threads: int | None
    image_size: int | tuple[int, int] | None
    min_crop: float
    flip: bool

    def __post_init__(self) -> None:
        mistakes = []
        if len(self.models) < 2:
            named = f"only {self.models[0]}" if self.models else "none"
            mistakes.append(f"A comparison needs at least two models, but {named} was named.")
        twice = [name for name in dict.fromkeys(self.models) if self.models.count(name) > 1]
        mistakes += [f"{name} is named twice: it would be compared with itself." for name in twice]
        for name in dict.fromkeys(self.models):
            mistakes += _message_of(preset, name)
        mistakes += _message_of(parse_budget, self.budget)
        least_one = {"--seeds": self.seeds, "--lr-search": self.lr_search}
        mistakes += [
            f"{option} is {value}, but must be at least 1." for option, value in least_one.items() if value < 1
        ]
        if not 0 < self.search_share < 1:
            mistakes.append(f"--search-share is {self.search_share}, but must be between 0 and 1.")
        if mistakes:
            raise UserError("\n".join(mistakes))

    def plain(self, train: str, val: str) -> dict[str, Any]:
        """The options as they are written to a file, with names that open the data from any folder."""
        values = {**dataclasses.asdict(dataclasses.replace(self, train=None, val=None)), "train": train, "val": val}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def pretraining(self, model: str, **settings: Any) -> PretrainOptions:
        """The options of `crate_mae.pretrain` for one of the models.

        No tracker is used, because a comparison writes its own tables.

        Args:
            model: its name.
            settings: options that replace those of the comparison.
        """
        shared = ("batch_size", "mask_ratio", "norm_pix_loss", "precision", "workers", "threads", "image_size")
        given = {key: getattr(self, key) for key in (*shared, "min_crop", "flip")}
        fixed = {"out": "", "trackers": (), "quiet": True}
        return PretrainOptions(self.train, **{**fixed, **given, "model": model, **settings})


def _message_of(check: Any, value: str) -> list[str]:
    try:
        check(value)
    except UserError as error:
        return [str(error)]
    return []
