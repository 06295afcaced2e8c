"""`crate-mae pretrain`, `finetune`, `resume` and `try`: train a model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_mae.commands.console import computes, takes
from crate_mae.commands.reconstruct import reconstruct
from crate_mae.data.files import path_of
from crate_mae.errors import UserError
from crate_mae.terminal import open_console
from crate_mae.training.options import FinetuneOptions, PretrainOptions

if TYPE_CHECKING:
    from crate_mae.training.run_directory import Run
else:
    Run = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


@takes(PretrainOptions)
def pretrain(options: PretrainOptions) -> Run:
    """Train a masked autoencoder on images; labels are not needed.

    Everything is checked before a file is written. If `out` is already a run, it is resumed where it stopped: options
    that are not given are taken from that run, and the others must be the same.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.recipes import with_recipe
    from crate_mae.training.start import start

    return start(with_recipe(options))


@takes(FinetuneOptions)
def finetune(options: FinetuneOptions) -> Run:
    """Train a classifier on labelled images, from a pretrained encoder or from scratch.

    All layers are trained. The model is evaluated on all validation images during training, and `out` ends up with the
    best one. Because these images select the best model, its accuracy on them is slightly optimistic: for a number to
    publish, evaluate it on a third set, or take the accuracy of the last row of metrics.csv.

    Everything is checked before a file is written. If `out` is already a run, it is resumed where it stopped: options
    that are not given are taken from that run, and the others must be the same.

    Returns:
        The run: `.path`, `.config`, `.model()` (the best one), `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.start import start

    return start(options)


@computes
def resume(run: Path | str, *, data_changed: bool = False, quiet: bool = False) -> Run:
    """Continue a run of pretraining or fine-tuning that was stopped, from its newest checkpoint.

    On the same machine the weights will be those of a run that was never stopped; on a CPU, bit for bit. If the images
    have changed, the run is refused unless you pass --data-changed; it then continues with the current images for the
    planned number of steps. Held-out images are found again by their content, and new images are trained on. The step
    of the change is recorded in data_changes.csv, the log and the report.

    Args:
        run: The folder of the run.
        data_changed: Continue even if images were removed, added or repaired.
        quiet: Print nothing.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: if this is not a run, or for a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.config import load_config
    from crate_mae.training.run_directory import RunDirectory
    from crate_mae.training.start import start

    directory = RunDirectory(path_of("RUN", run))
    if not directory.config_file.is_file():
        raise UserError(f"{run} is not a run: it has no config.yaml. Start one with: crate-mae pretrain DATA --out NEW")
    config = load_config(directory.config_file)
    return start(replace(config, quiet=quiet), data_changed=data_changed)


def try_digits(*, out: Path | str = Path("crate-mae-try"), epochs: int = 100) -> Run:
    """Pretrain on handwritten digits, complete masked ones, save a picture, and print what to do next.

    The 1,797 digits of 8 x 8 pixels come with scikit-learn. The model is trained on 1,500 of them and
    evaluated on the other 297, which are also in the picture. On two CPU cores this takes two to five minutes.

    Args:
        out: Folder of the run. An existing run is resumed, or displayed again if it has finished.
        epochs: Passes over the training images.

    Returns:
        The run.
    """
    run = pretrain("digits:train", out=out, val="digits:test", recipe="digits", epochs=epochs)
    assert isinstance(run.config, PretrainOptions)
    picture = run.path / "completed_digits.png"
    reconstruct(str(run.path), "digits:test", out=picture, mask_ratio=run.config.mask_ratio, count=12, overwrite=True)
    losses = [row["held_out_loss"] for row in run.metrics() if row["held_out_loss"] is not None]
    open_console().print_text(
        f"\nLoss on digits it never saw: {losses[0]:.3f} before training, {losses[-1]:.3f} now.\n"
        f"Look at {picture}: each column is one digit, as it is, with half of it hidden, and completed.\n"
        f"Now with your own images:\n"
        f"    crate-mae data check FOLDER\n"
        f"    crate-mae pretrain FOLDER --out runs/mine"
    )
    return run
