"""`crate-mae compare`: under equal conditions, is one model better than another on these images?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crate_mae.errors import RunStopped
from crate_mae.training.options import Data, ImageSize

if TYPE_CHECKING:
    from crate_mae.comparison.compare import Comparison
else:
    Comparison = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one

Models = Annotated[tuple[str, ...], Parameter(negative=())]


def compare(
    models: Models,
    *,
    train: Data,
    val: Data,
    budget: str,
    out: Annotated[Path | str, Parameter(alias="-o")],
    batch_size: int | None = None,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = False,
    seeds: int = 1,
    lr_search: int = 3,
    search_share: float = 0.3,
    probe_layer: int | None = None,
    pooling: Literal["cls", "mean", "cls+mean"] | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    workers: int | None = None,
    threads: int | None = None,
    image_size: ImageSize = None,
    min_crop: float = 0.2,
    flip: bool = True,
    dry_run: bool = False,
    quiet: bool = False,
) -> Comparison:
    """Pretrain models under the same budget, each with its own best learning rate, and measure them in the same way.

    Steps are timed first, in turns, so that each entry gets a fixed number of steps and a full schedule. Then a
    learning rate is searched for each entry, by the loss on held-out training images, and the entry is trained with the
    best. Completions are measured on the validation images, which are used for no choice; with labels, also a k-NN and
    a linear probe, and both for random weights and raw pixels as controls. With --budget minutes=N the time of a step
    includes loading its images if that takes longer than computing, or if there are no loader processes.

    `out` then contains table.md, table.csv, figure.png, curves.png, comparison.yaml, and all runs. The same command,
    given again, continues the comparison.

    Args:
        models: Two or more names from `crate-mae models`.
        train: Images for pretraining and for fitting the probes, in any form that `crate-mae pretrain` takes.
        val: Other images to measure on.
        budget: Budget of each entry, including the search: steps=N, minutes=N on this machine, or flops=N of training.
        out: Folder of the comparison.
        batch_size: Images per step. By default 256, less for little data.
        mask_ratio: Share of patches hidden in training.
        norm_pix_loss: Predict patches normalised by their own mean and standard deviation.
        seeds: Number of final runs of each entry, all with the same steps; the budget is for the first.
        lr_search: Number of learning rates to try, beginning with each model's default: three times the best so far, or
            a third of it, in the direction in which the loss falls, then between the best and its neighbour; 1 skips
            the search.
        search_share: Share of the budget for the search, divided equally among the tries.
        probe_layer: Encoder layer of the features, from 0, or negative from the end. By default as `crate-mae eval`.
        pooling: Class token, mean of patches, or both. By default as `crate-mae eval`.
        precision: By default whichever is measured to be faster here, for each entry.
        workers: Processes that load images. By default one less than there are cores, at most 8.
        threads: CPU threads. By default PyTorch's choice.
        image_size: Pixels, or HEIGHTxWIDTH. By default the models', if they agree.
        min_crop: Smallest share of an image that a random crop takes.
        flip: Mirror half of the images; unsuitable for text.
        dry_run: Only check, time, and print the plan.
        quiet: Print nothing.

    Returns:
        The comparison: `.path`, `.table`, `.notes`, `.results`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that the user can fix.
        RunStopped: after Ctrl-C or SIGTERM, when everything has been saved.
    """
    given = {key: value for key, value in locals().items() if key not in ("models", "out", "dry_run", "quiet")}
    from rich.console import Console

    from crate_mae.comparison.compare import compare as run
    from crate_mae.comparison.options import Options

    console = Console(highlight=False, quiet=quiet)

    def report(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        comparison = run(Options(models=tuple(models), **given), Path(out), dry_run=dry_run, report=report)
    except RunStopped:
        report("Stopped and saved. The same command, given again, continues.")
        raise
    if comparison.table:
        _print_comparison(console, comparison)
    return comparison


def _print_comparison(console: Any, comparison: "Comparison") -> None:
    """Print the table, the notes, and the paths of the files."""
    from rich.table import Table

    heading, *rows = comparison.table
    table = Table(heading[0], box=None)
    for name in heading[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in comparison.notes:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    for name in ("table.md", "table.csv", "figure.png", "curves.png"):
        console.print(f"Saved {comparison.path / name}", markup=False, soft_wrap=True)
