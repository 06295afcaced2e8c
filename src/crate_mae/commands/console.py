"""What commands share: how they are made of dataclasses of options, their checks, progress and messages."""

import dataclasses
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin

from rich.markup import escape
from rich.progress import Progress

from crate_mae.data.documents import to_json
from crate_mae.data.files import output_path, refuse_existing, refuse_used_folder
from crate_mae.data.numbers import LARGEST_SEED, check_whole
from crate_mae.errors import UserError
from crate_mae.options import GIVEN
from crate_mae.terminal import CleanConsole
from crate_mae.training.options import RunOptions, own_first

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def computes(command: Callable[P, R]) -> Callable[P, R]:
    """Run a command under this library's own settings of PyTorch; see `models.devices.own_settings`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from crate_mae.models.devices import own_settings

        with own_settings():
            return command(*args, **kwargs)

    return run


def takes(kind: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Make a function of options a function of keywords that `computes`: a command, for Python and the command line.

    Its signature and the section "Args" of its docstring are made from the fields of the dataclass `kind`.
    """
    parameters = _parameters(kind)
    signature = inspect.Signature(parameters)

    def decorate(function: Callable[[T], R]) -> Callable[P, R]:
        compute = computes(function)

        def command(*args: P.args, **kwargs: P.kwargs) -> R:
            names = signature.bind(*args, **kwargs).arguments  # names this function, not the dataclass, in its error
            options: Any = kind(*args, **kwargs)
            if isinstance(options, RunOptions):  # which know what was given; None stands for what was not
                given = {name: GIVEN for name in names if getattr(options, name) is not None}
                options = dataclasses.replace(options, origins=given)
            return compute(options)

        annotations = {each.name: each.annotation for each in parameters}
        result = function.__annotations__["return"]
        command.__name__ = command.__qualname__ = function.__name__
        command.__module__ = function.__module__
        command.__doc__ = _with_args(function.__doc__ or "", kind, signature.parameters)
        command.__annotations__ = {**annotations, "return": result}
        command.__signature__ = signature.replace(return_annotation=result)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """One parameter for each option; those without a default come first."""
    parameters = []
    for item in sorted(own_first(kind), key=lambda item: (item.kw_only, item.default is not dataclasses.MISSING)):
        default = inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default
        place = inspect.Parameter.KEYWORD_ONLY if item.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        hint: Any = _or_none(item.type) if default is None else item.type
        parameters.append(inspect.Parameter(item.name, place, default=default, annotation=hint))
    return parameters


def _or_none(hint: Any) -> Any:
    """A type that also allows None, with the same metadata."""
    if get_origin(hint) is not Annotated:
        return hint | None
    inner, *metadata = get_args(hint)
    return Annotated[(inner if inner is Any else inner | None, *metadata)]


def _with_args(docstring: str, kind: Any, names: Iterable[str]) -> str:
    """A docstring with the section "Args" before that of what is returned."""
    explanations = [
        textwrap.fill(
            f"{name}: {kind.__dataclass_fields__[name].metadata['help']}",
            width=120,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name in names
    ]
    return docstring.replace("    Returns:", "    Args:\n" + "\n".join(explanations) + "\n\n    Returns:", 1)


def new_file(option: str, path: Path | str, *suffixes: str, overwrite: bool) -> Path:
    """Check the path of a file to write, and return it.

    Raises:
        UserError: if its suffix is not one of those given, or the file exists and may not be replaced.
    """
    path = output_path(option, path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path} must name a {' or '.join(suffixes)} file.")
    if not overwrite:
        refuse_existing(path, "give another file, or add --overwrite")
    return path


def new_folder(path: Path | str, *, overwrite: bool | None = None) -> Path:
    """Check the path of a folder to write, given with --out, and return it.

    Args:
        path: of the folder.
        overwrite: see `refuse_used_folder`.

    Raises:
        UserError: if it is not a folder, has other files, or cannot be written to.
    """
    path = output_path("--out", path)
    refuse_used_folder(path, overwrite=overwrite)
    return path


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
        console.print_text(f"Left out: {location}: {reason}")


def print_if_random(console: CleanConsole, name: str, is_random: bool) -> None:
    """Print that a model has not been trained, if its initialisation is random."""
    if is_random:
        console.print_text(f"{name} has a random initialisation: give a run to see what training achieves.")
