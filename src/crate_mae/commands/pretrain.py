"""`crate-mae pretrain` and `crate-mae resume`: train a model on images without labels."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_mae.commands.console import computes
from crate_mae.data.files import path_of
from crate_mae.errors import UserError
from crate_mae.training.options import PretrainOptions, takes

if TYPE_CHECKING:
    from crate_mae.training.run_directory import Run
else:
    Run = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


@computes
@takes(PretrainOptions)
def pretrain(options: PretrainOptions) -> Run:
    """Train a masked autoencoder on images; labels are not needed.

    Everything is checked before a file is written. If `out` is a run already, it is resumed where it stopped: options
    that are not given are then taken from that run, and others must be the same.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.recipes import with_recipe
    from crate_mae.training.start import start

    return start(with_recipe(options))


@computes
def resume(run: Path | str, *, data_changed: bool = False, quiet: bool = False) -> Run:
    """Continue a run of pretraining or fine-tuning that was stopped, from its newest checkpoint.

    On the same machine the weights will be those of a run that was never stopped; on a CPU, bit for bit. A run whose
    images have changed is refused, unless that is meant: with --data-changed it goes on with the images as they are
    now, fewer or more, for as many steps as planned. Held-out images are found again by their content, and new images
    are trained on. From which step this was is noted in data_changes.csv, in the log and in the report.

    Args:
        run: The folder of the run.
        data_changed: Go on although images were removed, added or repaired.
        quiet: Print nothing.

    Returns:
        The run: `.path`, `.config`, `.model()`, `.metrics()`.

    Raises:
        UserError: if this is not a run, or for a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.run_directory import RunDirectory
    from crate_mae.training.start import start

    config = RunDirectory(path_of("RUN", run)).existing_config()
    if config is None:
        raise UserError(
            f"{run} is not a run: it has no config.yaml. Start one with: crate-mae pretrain DATA --out {run}"
        )
    return start(replace(config, quiet=quiet), data_changed=data_changed)
