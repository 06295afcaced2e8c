"""`crate-mae compare`: on equal terms, is one model better than another on these images?"""

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
    """Pretrain models under the same budget, each with its own best learning rate, and measure them alike.

    Steps are timed first, in turns, so that each contestant gets a fixed number of steps and a full schedule. Then each
    searches its learning rate, by the loss on held-out training images, and trains with the best. On the validation
    images, which nothing was chosen by, completions are measured, and with labels a k-NN and a linear probe, also of
    random weights and raw pixels. With --budget minutes=N a step's time includes loading its images where that takes
    longer than computing, or where there are no loader processes.

    `out` then holds table.md, table.csv, figure.png, curves.png, comparison.yaml, and all runs. The same command, given
    again, goes on where it was.

    Args:
        models: Two or more names from `crate-mae models`.
        train: Images to pretrain on, and for the probes to learn from, in any form that `crate-mae pretrain` takes.
        val: Other images to measure on.
        budget: Of each contestant, the search included: steps=N, minutes=N of this machine, or flops=N of training.
        out: The folder of the comparison.
        batch_size: Images per step. By default 256, less for little data.
        mask_ratio: Share of patches hidden in training.
        norm_pix_loss: Predict patches normalised by their own mean and standard deviation.
        seeds: Final runs of each contestant, each with the same steps; the budget is for the first.
        lr_search: Learning rates to try, beginning with each model's default: each three times the best so far, or a
            third of it, whichever way the loss falls, then between the best and its neighbour; 1 tries none.
        search_share: Share of the budget for the search, in equal parts.
        probe_layer: Encoder layer of the features, from 0, or negative from the end. By default as `crate-mae eval`.
        pooling: Class token, mean of patches, or both. By default as `crate-mae eval`.
        precision: By default whichever is faster here for each contestant, measured.
        workers: Processes that load images. By default one less than there are cores, at most 8.
        threads: CPU threads that compute. By default PyTorch's choice.
        image_size: Pixels, or HEIGHTxWIDTH. By default the models', if they agree.
        min_crop: Smallest share of an image that a random crop takes.
        flip: Mirror half of the images; wrong for writing.
        dry_run: Only check, time and show the plan.
        quiet: Show nothing.

    Returns:
        The comparison: `.path`, `.table`, `.notes`, `.outcomes`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be mended.
        RunStopped: after Ctrl-C or SIGTERM, when everything has been saved.
    """
    given = {key: value for key, value in locals().items() if key not in ("models", "out", "dry_run", "quiet")}
    from rich.console import Console

    from crate_mae.comparison.compare import compare as run
    from crate_mae.comparison.options import Options

    console = Console(highlight=False, quiet=quiet)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        comparison = run(Options(models=tuple(models), **given), Path(out), dry_run=dry_run, say=say)
    except RunStopped:
        say("Stopped and saved. The same command, given again, goes on.")
        raise
    if comparison.table:
        _show(console, comparison)
    return comparison


def _show(console: Any, comparison: "Comparison") -> None:
    """The table, the notes, and where everything is."""
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
