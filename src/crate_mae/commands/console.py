"""Checks, progress and messages that commands share."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rich.markup import escape
from rich.progress import Progress

from crate_mae.data.documents import to_json
from crate_mae.data.files import output_path
from crate_mae.data.numbers import LARGEST_SEED, check_whole
from crate_mae.errors import UserError
from crate_mae.terminal import CleanConsole

P = ParamSpec("P")
R = TypeVar("R")

JSON_HELP = "Print one JSON object on the standard output, and everything else on the standard error."


def computes(command: Callable[P, R]) -> Callable[P, R]:
    """Run a command under this library's own settings of PyTorch; see `models.devices.own_settings`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from crate_mae.models.devices import own_settings

        with own_settings():
            return command(*args, **kwargs)

    return run


def new_file(option: str, path: Path | str, *suffixes: str, overwrite: bool) -> Path:
    """Check the path of a file to write, and return it.

    Raises:
        UserError: if its suffix is wrong, or the file exists and may not be replaced.
    """
    path = output_path(option, path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path} must name a {' or '.join(suffixes)} file.")
    refuse_existing(path, overwrite=overwrite)
    return path


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise a `UserError` for an existing file that may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already. Give another file, or add --overwrite.")


def check_seed(seed: int) -> None:
    """Raise a `UserError` for a seed that some generator does not accept."""
    check_whole("--seed", seed, 0, LARGEST_SEED)


@contextmanager
def progress(console: CleanConsole, what: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar while a block runs, if the console is a terminal; yields what advances it by 1, or by a number."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield functools.partial(bar.advance, bar.add_task(escape(what), total=total))


def print_json(value: Any) -> None:
    """Print a value as JSON, in ASCII: other characters would be escaped for the terminal, not for JSON."""
    sys.stdout.write(to_json(value, ascii_only=True) + "\n")
    sys.stdout.flush()


def print_bad(console: CleanConsole, bad: Iterable[tuple[str, str]]) -> None:
    """Print a line for each image that was left out."""
    for location, reason in bad:
        console.say(f"Left out: {location}: {reason}")


def print_random_initialisation(console: CleanConsole, name: str) -> None:
    """Print that a model has not been trained."""
    console.say(f"{name} has a random initialisation: give a run to see what training achieves.")
