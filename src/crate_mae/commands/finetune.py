"""`crate-mae finetune`: train a classifier on labelled images, from a pretrained model or a random initialisation."""

from typing import TYPE_CHECKING, Any

from crate_mae.commands.console import computes
from crate_mae.training.options import FinetuneOptions, takes

if TYPE_CHECKING:
    from crate_mae.training.run_directory import Run
else:
    Run = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


@computes
@takes(FinetuneOptions)
def finetune(options: FinetuneOptions) -> Run:
    """Train a classifier on labelled images, from a pretrained encoder or from scratch.

    All layers learn. The model is measured on all validation images as it learns, and in the end `out` holds the one
    that did best. Since these images have chosen it, its accuracy on them is a little optimistic: for a number to
    publish, measure it on a third set, or take the accuracy of the last row of metrics.csv.

    Everything is checked before a file is written. If `out` is a run already, it is resumed where it stopped: options
    that are not given are then taken from that run, and others must be the same.

    Returns:
        The run: `.path`, `.config`, `.model()` (the best one), `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be fixed.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.training.start import start

    return start(options)
