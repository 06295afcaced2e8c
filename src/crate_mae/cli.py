"""The command line: each command is a documented function of `crate_mae.commands`, imported when it is called.

Exit codes: 0 success; 1 a bug in the library, with its traceback; 2 a mistake in the user's input; 130 and 143 stopped
by Ctrl-C and SIGTERM, 129 by SIGHUP (a closed terminal).
"""

import errno
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.config import Dict
from cyclopts.types import ExistingFile

from crate_mae.data.documents import read_yaml
from crate_mae.data.files import path_of
from crate_mae.errors import RunStopped, UserError, and_more
from crate_mae.terminal import clean_warnings, open_console

_LARGEST = 2**53  # whole numbers up to which floats are exact
# name: (function, its line in `crate-mae --help`, which does not import the function)
_COMMANDS = {
    "try": ("train:try_digits", "Pretrain on the handwritten digits of scikit-learn, in two to five minutes."),
    "pretrain": ("train:pretrain", "Pretrain on unlabelled images."),
    "finetune": ("train:finetune", "Train a classifier on labelled images, from a pretrained model or from scratch."),
    "resume": ("train:resume", "Continue an interrupted run exactly from its last checkpoint."),
    "predict": ("predict:predict", "Predict the classes of images and write them to a CSV file."),
    "reconstruct": ("reconstruct:reconstruct", "Mask images, complete them, and save a picture of the result."),
    "embed": ("embed:embed", "Save features of images."),
    "export": ("export:export", "Export a trained model to timm, Hugging Face, ONNX or torch.export."),
    "convert": ("export:convert", "Convert published weights of the official code to a model folder."),
    "push": ("export:push", "Upload a trained model to the Hugging Face Hub, with a card made from its run."),
    "compare": ("compare:compare", "Pretrain several models with the same budget, and compare them."),
    "inspect": ("reports:inspect", "Measure whether each layer does what it was derived to do, with controls."),
    "theory": ("reports:theory", "Test the theory on data that satisfy its assumptions, and explain the results."),
    "app": ("app:app", "Start a web app: hide parts of an image, see it completed, and inspect the layers."),
    "estimate": ("estimate:estimate", "Estimate what a run needs: operations, memory, time on many devices."),
    "models": ("about:models", "List the names of models."),
    "recipes": ("about:recipes", "List recipes: tested sets of options for pretraining, with their results."),
    "doctor": ("about:doctor", "Describe this machine and installation for a bug report."),
}
# name: (its line, its commands)
_GROUPS = {
    "data": (
        "Check images before training on them, or make them smaller.",
        {
            "check": ("data:check", "Decode, count and measure all images."),
            "resize": ("data:resize", "Write a copy with smaller images."),
        },
    ),
    "eval": (
        "Evaluate the features and completions of a trained model.",
        {
            "knn": ("evaluate:eval_knn", "Classify by nearest neighbours of frozen features."),
            "linear": ("evaluate:eval_linear", "Fit a linear classifier to frozen features."),
            "fewshot": (
                "evaluate:eval_fewshot",
                "Fit a linear classifier to a few images of each class, averaged over many draws.",
            ),
            "reconstruction": (
                "reconstruct:eval_reconstruction",
                "Measure the quality of completions at several mask ratios.",
            ),
        },
    ),
    "viz": (
        "Visualise the features and layers of a trained model.",
        {
            "reconstruction": (
                "reconstruct:reconstruct",
                "Mask images and complete them; same as `crate-mae reconstruct`.",
            ),
            "attention": ("viz:viz_attention", "Show the attention of the class token."),
            "pca": ("viz:viz_pca", "Show tokens as colours by their principal components."),
            "layers": ("viz:viz_layers", "Plot subspace rate, sparsity and rank over the layers."),
            "atoms": (
                "viz:viz_atoms",
                "Show which patches activate single atoms of a sparse code, and what the decoder draws.",
            ),
        },
    ),
}
# Errors that a file or folder of the user can cause anywhere; others are bugs.
_OF_THE_MACHINE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


def build_app() -> App:
    """Build the command line; `build_app().meta` also takes `--config`."""
    app = App(
        name="crate-mae",
        help="Pretrain a white-box masked autoencoder on your images, complete masked images, and inspect its layers.",
        help_epilogue="Start with `crate-mae try`. `crate-mae COMMAND --help` explains the options of a command.",
        version=lambda: version("crate-mae"),
        result_action="return_value",
    )
    _add(app, _COMMANDS)
    for name, (text, commands) in _GROUPS.items():
        group = App(name=name, help=text)
        _add(group, commands)
        app.command(group)
    app.register_install_completion_command(help="Install completion of commands and options for this shell.")

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: ExistingFile | None = None,
    ) -> object:
        """Run a command, with options from a file if one is given.

        Args:
            tokens: The command and its options, as typed.
            config: YAML file with options of the command; options on the command line override it.
        """
        app.config = (_check_words,) if config is None else (partial(_options_of, config), _check_words)
        return app(tokens, exit_on_error=False, print_error=False)

    return app


def _add(app: App, commands: dict[str, tuple[str, str]]) -> None:
    for name, (function, text) in commands.items():
        app.command(f"crate_mae.commands.{function}", name=name, help=text)


def _options_of(file: Path, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill the options of a command from a flat file; the file of a run also names its command."""
    options = read_yaml(file)
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UserError(f"{file} must hold options by name, one a line, such as `steps: 100`.")
    options = {key: value for key, value in options.items() if value is not None}  # null: as if it were not there
    # `data: ...` in the file is an option of `pretrain`. In a flat file Cyclopts would read this key as the command
    # `data`, but not below the key `pretrain`: so the options are nested below the name of the command.
    if (kind := options.pop("command", None)) is not None and commands and kind != commands[-1]:
        raise UserError(f"{file} holds the options of `crate-mae {kind}`, not of `crate-mae {commands[-1]}`.")
    for command in reversed(commands):
        options = {command: options}
    Dict(options, source=str(file))(app, commands, arguments)


def _check_words(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse what Cyclopts would round, and what no option means: 2.7 steps, a rate of inf, data of an empty name."""
    for argument in arguments:
        kinds = _kinds(argument.hint)
        for word in (token.value for token in argument.tokens):
            if not word and (Path in kinds or argument.parameter.converter is not None):
                path_of(argument.name, word)  # which refuses an empty one
            if {int, float} & kinds and (wrong := _not_a_number_of(kinds, word)):
                raise UserError(f"{argument.name} is {word[:100]}, but must be {wrong}.")


def _kinds(hint: Any) -> set[Any]:
    """The simple types that a hint is made of: int and None, of `tuple[int, ...] | None`."""
    inner = [part for part in get_args(hint) if part is not ...]
    return set().union(*map(_kinds, inner)) if inner and get_origin(hint) is not Literal else {hint}


def _not_a_number_of(kinds: set[Any], word: str) -> str:
    """The kind of number that the option needs, if `word` is a number of another kind; the rest is left to Cyclopts."""
    try:
        value = float(word)
    except ValueError:
        return ""
    if not math.isfinite(value):
        return "a finite number"
    if float in kinds:
        return ""
    return "" if value.is_integer() and abs(value) <= _LARGEST else f"a whole number of at most {_LARGEST:,}"


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a closed terminal, end the program as Ctrl-C does: no file stays incomplete."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    handled: list[int] = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not on Windows
        handled = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is end:  # a run that has lost its other processes ignores SIGTERM
                signal.signal(number, signal.SIG_DFL)


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line on `tokens`, by default `sys.argv`; see the module for exit codes."""
    try:
        with _terminated_cleanly(), clean_warnings():
            build_app().meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except UnusedCliTokensError as error:
        _fail(
            f"{and_more(error.unused_tokens or [], 1)} cannot be used here: the command has what it needs before. If a "
            "pattern such as *.jpg was meant, give its folder, or put it in quotes."
        )
    except (UserError, CycloptsError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = "" if error.filename is None else f" {error.filename}:"
        _fail(f"The operating system refused:{where} {os.strerror(error.errno).lower()}.")
    except RunStopped as stopped:
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    console = open_console(stderr=True)
    console.print("Error: ", style="bold red", end="")
    console.print_text(message)
    sys.exit(2)
