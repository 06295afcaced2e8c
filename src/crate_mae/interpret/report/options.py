"""The options of a report."""

import shlex
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Any, no_type_check

from crate_mae.data.numbers import LARGEST_SEED
from crate_mae.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    Data,
    OutputPath,
    Range,
    as_words,
    check_ranges,
    option,
    saved_values,
)


@no_type_check  # values come from users: `__post_init__` reports all wrong ones together
@dataclass(frozen=True)
class InspectOptions:
    """The options of `crate_mae.inspect`, with which its report can be made again.

    Raises:
        UserError: for all invalid options at once.
    """

    model: Data = option(
        MISSING,
        "A run folder, a folder with model.safetensors and config.json, hf:user/name, a model's name (random "
        "initialisation), or timm:NAME of a Vision Transformer.",
    )
    data: Data = option(
        MISSING, "Images that the model was not trained on, in any form that `crate-mae pretrain` takes."
    )
    _: KW_ONLY
    out: OutputPath = option(MISSING, "New or empty folder for the report.", saved=False)
    baseline: Data = option(
        None, "Another model to measure on the same images, such as a run of a ViT-MAE, or timm:NAME."
    )
    other_data: Data = option(None, "Images of another kind, such as photographs.")
    train_data: Data = option(
        None,
        "Images that the model was trained on; if they and DATA have labels, a linear probe is fitted to them for each "
        "layer.",
    )
    foregrounds: Path | str | None = option(
        None,
        "A folder of masks named like their images, in which 0 is background, or a .csv file of boxes "
        "(image,left,top,right,bottom); the foregrounds that each layer finds are compared with them.",
    )
    count: int = option(256, "Maximum number of images of each kind.", AT_LEAST_1)
    mask_ratio: float = option(
        None, "Share of patches to hide while layers are measured; by default, none.", BETWEEN_0_AND_1
    )
    probe_images: int = option(
        2000,
        "Maximum number of images to fit a probe on, and to evaluate it on; 0 for no probes. Without --train-data, if "
        "DATA has labels, up to this many of its images are used to probe the model with and without mixing: half to "
        "fit, half to evaluate.",
        AT_LEAST_0,
    )
    interventions: bool = option(
        False,
        "Also remove each head, and 16 atoms of each layer's code, one at a time, and compare the effect with that of "
        "random removals of the same size. This takes minutes; the estimate is printed first.",
    )
    seed: int = option(
        0,
        "Seed for the sample of images, the masks and random initialisation.",
        Range(lambda x: 0 <= x <= LARGEST_SEED, f"from 0 to {LARGEST_SEED:,}"),
    )
    quiet: bool = option(False, "Print nothing.", saved=False)

    def __post_init__(self) -> None:
        check_ranges(self).raise_if_any()

    def command(self) -> str:
        """The command that makes the report again."""
        values = {name: value for name, value in self.named().items() if value is not None and value is not False}
        model, data = values.pop("model"), values.pop("data")
        return shlex.join(["crate-mae", "inspect", model, data, "--out", "DIR", *as_words(values)])

    def named(self) -> dict[str, Any]:
        """All that belong to the report, as values that JSON has."""
        values = saved_values(self).items()
        return {name: v if v is None or isinstance(v, (int, float)) else name_of(v) for name, v in values}


def name_of(thing: Any) -> str:
    """The name that the user gave a model or data; for an object from Python, its class."""
    return str(thing) if isinstance(thing, (str, Path, int, float)) else type(thing).__name__
