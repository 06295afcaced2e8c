"""What a report is asked for."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_mae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a report, with which it can be made again.

    Attributes:
        model: any form of MODEL, or a module from Python.
        data: any form of DATA: images that the model was not trained on.
        baseline: another model, measured on the same images.
        other_data: images of another kind.
        train_data: images that the model was trained on.
        foregrounds: masks or boxes of the images of `data`, see `interpret.foregrounds.read_drawings`.
        count: most images of each.
        mask_ratio: share of patches that are hidden while layers are measured; None hides none.
        probe_images: most training images, and most others, of the linear probes; 0 for none.
        seed: of the choice of images, of masks, and of fresh weights.

    Raises:
        UserError: naming every option that makes no sense, at once.
    """

    model: Any
    data: Any
    baseline: Any = None
    other_data: Any = None
    train_data: Any = None
    foregrounds: Any = None
    count: int = 256
    mask_ratio: float | None = None
    probe_images: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if mistakes := list(self._mistakes()):
            raise UserError("\n".join(mistakes))

    def _mistakes(self) -> Iterator[str]:
        if self.count < 1:
            yield f"--count is {self.count}, but must be at least 1."
        if self.mask_ratio is not None and not 0.0 < self.mask_ratio < 1.0:
            yield f"--mask-ratio is {self.mask_ratio}, but must be between 0 and 1; leave it out to hide nothing."
        if self.probe_images < 0:
            yield f"--probe-images is {self.probe_images}, but must be at least 0."
        if self.seed < 0:
            yield f"--seed is {self.seed}, but must be at least 0."

    def command(self) -> str:
        """What to type to make the report again."""
        words = ["crate-mae", "inspect", name_of(self.model), name_of(self.data), "--out", "DIR"]
        for option in ("baseline", "other_data", "train_data", "foregrounds", "mask_ratio"):
            value = getattr(self, option)
            words += [] if value is None else [f"--{option.replace('_', '-')}", name_of(value)]
        for option in ("count", "probe_images", "seed"):
            words += [f"--{option.replace('_', '-')}", str(getattr(self, option))]
        return shlex.join(words)

    def named(self) -> dict[str, Any]:
        """All of them as JSON can say them."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return {key: v if v is None or isinstance(v, (int, float)) else name_of(v) for key, v in values.items()}


def name_of(thing: Any) -> str:
    """What the user called a model or data; of an object from Python, its class."""
    return str(thing) if isinstance(thing, (str, Path, int, float)) else type(thing).__name__
