"""What commands that evaluate a model refuse and print alike."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from crate_mae.errors import UserError

if TYPE_CHECKING:
    from crate_mae.data import ImageSource
    from crate_mae.evaluation.backbones import Backbone
    from crate_mae.evaluation.extract import Extraction, Features

_LARGEST_SEED = 2**32 - 1
OWN_STATISTICS = "Brightness and contrast of each patch come from the original: targets were normalised."


def new_file(option: str, path: Path | str, suffix: str, *, overwrite: bool) -> Path:
    """The path of a file that a command is to write.

    Raises:
        UserError: if its name does not end as it must, or the file is there and may not be replaced.
    """
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {path} must name a {suffix} file.")
    refuse_existing(path, overwrite=overwrite)
    return path


def check_seed(seed: int) -> None:
    """Raise a `UserError` for a seed that not every generator takes."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"--seed is {seed}, but must be between 0 and {_LARGEST_SEED}.")


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise a `UserError` for a file that is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another file, or add --overwrite.")


def extract_shown(
    console: Console, backbone: "Backbone", source: "ImageSource", extraction: "Extraction"
) -> "list[Features]":
    """`evaluation.extract.extract` with a progress bar."""
    from crate_mae.evaluation.extract import extract

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Encoding {source.name}", total=len(source))
        showing = dataclasses.replace(extraction, on_images=lambda count: progress.advance(task, count))
        return extract(backbone, source, showing)


def show_bad(console: Console, bad: Iterable[tuple[str, str]]) -> None:
    """Print a line for each image that was left out."""
    for location, reason in bad:
        console.print(f"Left out: {location}: {reason}", soft_wrap=True, markup=False)


def show_fresh(console: Console, name: str) -> None:
    """Say that the weights are random."""
    console.print(
        f"{name} has fresh, untrained weights: name a run to see what training gives.", soft_wrap=True, markup=False
    )
