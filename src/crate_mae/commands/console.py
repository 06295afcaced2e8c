"""Checks, progress and messages that commands share."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import Progress

from crate_mae.data.files import output_path
from crate_mae.data.numbers import check_whole
from crate_mae.errors import UserError

if TYPE_CHECKING:
    from crate_mae.data import ImageSource
    from crate_mae.evaluation.backbones import Backbone
    from crate_mae.evaluation.extract import Extraction, Features

P = ParamSpec("P")
R = TypeVar("R")

_LARGEST_SEED = 2**32 - 1
OWN_STATISTICS = "Brightness and contrast of each patch come from the original: targets were normalised."


JSON_HELP = "Print one JSON object on the standard output, and everything else on the standard error."


def computes(command: Callable[P, R]) -> Callable[P, R]:
    """Run a command under this library's own settings of PyTorch; see `models.devices.own_settings`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from crate_mae.models.devices import own_settings

        with own_settings():
            return command(*args, **kwargs)

    return run


def new_file(option: str, path: Path | str, suffix: str, *, overwrite: bool) -> Path:
    """Check the path of a file to write, and return it.

    Raises:
        UserError: if its suffix is wrong, or the file exists and may not be replaced.
    """
    path = output_path(option, path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {path} must name a {suffix} file.")
    refuse_existing(path, overwrite=overwrite)
    return path


def check_seed(seed: int) -> None:
    """Raise a `UserError` for a seed that some generator does not accept."""
    check_whole("--seed", seed, 0, _LARGEST_SEED)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise a `UserError` for an existing file that may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already. Give another file, or add --overwrite.")


def extract_with_progress(
    console: Console, backbone: "Backbone", source: "ImageSource", extraction: "Extraction"
) -> "list[Features]":
    """`evaluation.extract.extract` with a progress bar."""
    from crate_mae.evaluation.extract import extract

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Encoding {source.name}", total=len(source))
        with_progress = dataclasses.replace(extraction, on_images=lambda count: progress.advance(task, count))
        return extract(backbone, source, with_progress)


def print_json(value: Any) -> None:
    """Print a value as JSON, in ASCII: other characters would be escaped for the terminal, not for JSON."""
    from crate_mae.data.documents import to_json

    sys.stdout.write(to_json(value, ascii_only=True) + "\n")
    sys.stdout.flush()


def print_bad(console: Console, bad: Iterable[tuple[str, str]]) -> None:
    """Print a line for each image that was left out."""
    for location, reason in bad:
        console.print(f"Left out: {location}: {reason}", soft_wrap=True, markup=False)


def print_random_initialisation(console: Console, name: str) -> None:
    """Print that a model has not been trained."""
    console.print(
        f"{name} has a random initialisation: give a run to see what training achieves.", soft_wrap=True, markup=False
    )
