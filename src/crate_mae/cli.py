"""The command line: each command is a documented function of `crate_mae.commands`, imported when it is called.

Exit codes: 0 done; 1 a defect of ours, with its traceback; 2 a mistake that the user can mend; 130 and 143 stopped by
Ctrl-C and SIGTERM.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict, Yaml
from cyclopts.types import ExistingFile
from rich.console import Console

from crate_mae.errors import RunStopped, UserError

# name: (function, what `crate-mae --help` says without importing the function)
_COMMANDS = {
    "try": ("try_digits:try_digits", "Pretrain on handwritten digits that are on every machine, in under 3 minutes."),
    "pretrain": ("pretrain:pretrain", "Pretrain on unlabelled images."),
    "finetune": ("finetune:finetune", "Train a classifier on labelled images, from a pretrained model or not."),
    "resume": ("pretrain:resume", "Go on with an interrupted run, exactly where its last checkpoint was."),
    "predict": ("predict:predict", "Predict the classes of images, into a CSV file."),
    "reconstruct": ("reconstruct:reconstruct", "Mask images, complete them, and save the picture."),
    "embed": ("embed:embed", "Save the features of images."),
    "export": ("export:export", "Write a trained model for use elsewhere: timm, Hugging Face, ONNX, torch.export."),
    "convert": ("convert:convert", "Convert published weights, of the official code, into a folder for every command."),
    "push": ("push:push", "Upload a trained model to the Hugging Face Hub, with a card made from its run."),
    "compare": ("compare:compare", "Pretrain models under the same budget, and measure them alike."),
    "inspect": ("inspect:inspect", "Hold every layer of a model to what it was derived to do, next to controls."),
    "theory": ("theory:theory", "Test the theory where its assumptions hold, and explain what came out."),
    "app": ("app:app", "Open a page to play with: hide parts of a picture, see it completed, look inside."),
    "estimate": ("estimate:estimate", "Count what a run asks for: operations, memory, time on many devices."),
    "models": ("models:models", "List the models that can be named."),
    "recipes": ("recipes:recipes", "List options of pretraining that were tried together, with what they gave."),
    "doctor": ("doctor:doctor", "Describe this machine and installation, for a bug report."),
}
_EVAL_COMMANDS = {
    "knn": ("evaluate:eval_knn", "Classify by nearest neighbours among frozen features."),
    "linear": ("evaluate:eval_linear", "Fit a linear classifier to frozen features."),
    "fewshot": ("evaluate:eval_fewshot", "Fit a linear classifier to a few images of each class, many times."),
    "reconstruction": ("evaluate_reconstruction:eval_reconstruction", "Measure completions over mask ratios."),
}
_VIZ_COMMANDS = {
    "reconstruction": ("reconstruct:reconstruct", "Mask images and complete them: `reconstruct` by its other name."),
    "attention": ("viz:viz_attention", "Show what the class token looks at."),
    "pca": ("viz:viz_pca", "Show tokens as colours, by their principal components."),
    "layers": ("viz:viz_layers", "Show what each layer does to subspace rate, sparsity and rank."),
}


def build_app() -> App:
    """The commands and their options; `build_app().meta` takes `--config` as well."""
    app = App(
        name="crate-mae",
        help="Pretrain a white-box masked autoencoder on your own images, complete masked pictures, and look inside.",
        help_epilogue="Start with `crate-mae try`. `crate-mae COMMAND --help` explains a command's options.",
        version=lambda: version("crate-mae"),
        result_action="return_value",
    )
    for name, (function, text) in _COMMANDS.items():
        app.command(f"crate_mae.commands.{function}", name=name, help=text)
    data = App(name="data", help="Look at images before training on them.")
    data.command("crate_mae.commands.data:check", name="check", help="Count, measure and decode all images.")
    app.command(data)
    evaluate = App(name="eval", help="Measure what a trained model is worth: its features, and its completions.")
    for name, (function, text) in _EVAL_COMMANDS.items():
        evaluate.command(f"crate_mae.commands.{function}", name=name, help=text)
    app.command(evaluate)
    viz = App(name="viz", help="Draw what a trained model sees, and what its layers do.")
    for name, (function, text) in _VIZ_COMMANDS.items():
        viz.command(f"crate_mae.commands.{function}", name=name, help=text)
    app.command(viz)

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: ExistingFile | None = None,
    ) -> object:
        """Run a command, with options from a file if one is named.

        Args:
            tokens: the command and its options, as typed.
            config: YAML file of the command's options; options typed after it win.
        """
        if config is not None:
            app.config = partial(_options_of, Yaml(config, must_exist=True))
        return app(tokens, exit_on_error=False, print_error=False)

    return app


def _options_of(file: Yaml, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill a command's options from a flat file; that of a run says which command it is of."""
    # The file says `data: ...`, an option of `pretrain`. Cyclopts would take that key of a flat file for the command
    # `data`, but not one that stands below the key `pretrain`: so that is where the options are put.
    options: dict[str, Any] = dict(file.config)
    if (kind := options.pop("command", None)) is not None and commands and kind != commands[-1]:
        raise UserError(f"{file.path} holds the options of `crate-mae {kind}`, not of `crate-mae {commands[-1]}`.")
    for command in reversed(commands):
        options = {command: options}
    Dict(options, source=str(file.path))(app, commands, arguments)


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, so that no half-written file is left behind."""
    usual = signal.getsignal(signal.SIGTERM)
    if usual is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # a run that has lost its other processes ignores it from then on
            signal.signal(signal.SIGTERM, usual)


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line, on `sys.argv` if no tokens are given; see the module for exit codes."""
    console = Console(stderr=True, highlight=False)
    try:
        with _terminated_cleanly():
            build_app().meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (UserError, CycloptsError) as error:
        console.print("[bold red]Error:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(2)
    except RunStopped as stopped:
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)
