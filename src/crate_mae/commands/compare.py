"""`crate-mae compare`: under equal conditions, is one model better than another on these images?"""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from crate_mae.commands.console import print_json, takes
from crate_mae.comparison.options import CompareOptions
from crate_mae.errors import RunStopped
from crate_mae.terminal import open_console

if TYPE_CHECKING:
    from crate_mae.comparison.compare import Comparison
else:
    Comparison = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


@takes(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Pretrain models under the same budget, each with its own best learning rate, and measure them in the same way.

    Steps are timed first, in turns, so that each entry gets a fixed number of steps and a full schedule. Then a
    learning rate is searched for each entry, by the loss on held-out training images, and the entry is trained with
    the best. An entry may leave settings to this search, such as "NAME?depth=2|3|4&embed_dim=384|512"; then all
    entries must have as many alternatives. Completions are measured on the validation images, which are used for no
    choice; with labels, also a k-NN and a linear probe, and both for random initialisation and raw pixels as
    controls. With --budget minutes=N the time of a step includes loading its images if that takes longer than
    computing, or if there are no loader processes.

    `out` then contains table.md, table.csv, seeds.csv, figure.png, curves.png, comparison.yaml, and all runs. The same
    command, given again, continues the comparison.

    Returns:
        The comparison: `.path`, `.table`, `.notes`, `.results`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that the user can fix.
        RunStopped: after Ctrl-C, SIGTERM or SIGHUP, when everything has been saved.
    """
    from crate_mae.comparison.compare import compare as run

    console = open_console(quiet=options.quiet, stderr=options.json)
    try:
        comparison = run(options, report=console.print_text)
    except RunStopped:
        console.print_text("Stopped and saved. The same command, given again, continues.")
        raise
    if options.json:
        print_json(comparison.plan)
    if not comparison.table:
        return comparison
    heading, *rows = comparison.table
    table = Table(heading[0], box=None)
    for name in heading[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in comparison.notes:
        console.print_text(f"- {note}")
    for name in ("table.md", "table.csv", "seeds.csv", "figure.png", "curves.png"):
        console.print_text(f"Saved {comparison.path / name}")
    return comparison
