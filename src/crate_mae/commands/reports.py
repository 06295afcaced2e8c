"""`crate-mae inspect` and `crate-mae theory`: what each layer does, and whether the theory holds, as HTML reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from crate_mae.commands.console import check_seed, computes, new_folder, takes
from crate_mae.data.files import path_of, write_whole
from crate_mae.drawing.measures import MEASURES
from crate_mae.errors import UserError
from crate_mae.interpret.report.options import InspectOptions
from crate_mae.options import OutputPath
from crate_mae.terminal import CleanConsole, open_console

if TYPE_CHECKING:
    from crate_mae.interpret.report.inspection import Training


@takes(InspectOptions)
def inspect(options: InspectOptions) -> Path:
    """Measure a model layer by layer, next to controls, and explain the results in a report.

    Rates, sparsity, ranks, subspaces, dictionaries, inverses and the information that tokens retain are measured on
    images, every step of a layer is compared with controls (moves that need no derivation, and five random
    initialisations of the network), the model is measured with attention that mixes no tokens, and some atoms of its
    last layer are shown. The same is measured for the same network with random initialisation, and for the controls
    that you name. What a model does not have is left out, and the report gives the reason.

    `out` then holds report.html, one file to read without a network; measures.json, measures.csv, audit.csv,
    attention.csv, atoms.csv and interventions.csv, with all numbers; and each figure as PNG and PDF.

    Returns:
        The path of the report, `out`/report.html.

    Raises:
        UserError: for a mistake in the options, the models or the data; no file is written then.
    """
    folder = new_folder(options.out)
    from crate_mae.interpret.report.html import REPORT_FILE, report_files
    from crate_mae.interpret.report.inspection import inspect_model

    console = open_console(quiet=options.quiet)
    with console.status("Opening ...") as status:
        inspection = inspect_model(
            options,
            training=_training(options.model),
            on_stage=lambda stage: status.update(f"Measuring {stage} ..."),
        )
        status.update("Drawing ...")
        files = report_files(inspection)
    for note in inspection.notes:
        console.print_text(note)
    return _saved(console, files, folder, REPORT_FILE)


def _training(model: object) -> "Training":
    """How a run trained its model; empty if the model is not a run."""
    from crate_mae.interpret.report.inspection import Training
    from crate_mae.training.config import load_config
    from crate_mae.training.options import PretrainOptions
    from crate_mae.training.run_directory import RunDirectory

    if not isinstance(model, (str, Path)) or not RunDirectory(path_of("MODEL", model)).config_file.is_file():
        return Training()
    run = RunDirectory(Path(model))
    try:
        config = load_config(run.config_file)
    except UserError as error:  # a run of another version can still be inspected
        return Training(lines={"Options": f"unknown: {error}"})
    logged = run.metrics().read()
    data = config.data if isinstance(config, PretrainOptions) else config.train
    lines = {
        "Images": data,
        "Steps": f"{config.steps:,} of {config.batch_size} images",
        "Learning rate": f"{config.lr:g}, weight decay {config.weight_decay:g}",
        "Finished": "yes" if run.is_finished else f"no, at step {logged[-1]['step'] if logged else 0}",
        "Seed": str(config.seed),
    }
    hidden = config.mask_ratio if isinstance(config, PretrainOptions) else None
    if hidden is not None:
        lines["Hidden in training"] = f"{100 * hidden:g}% of the patches"
    for column in ("loss", "held_out_loss"):
        values = [float(row[column]) for row in logged if row.get(column)]
        if values:
            lines[MEASURES[column].title.capitalize()] = f"{values[0]:.4g} → {values[-1]:.4g}"
    return Training(lines=lines, mask_ratio=hidden, data=data)


@computes
def theory(
    *,
    out: OutputPath,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Test the theory on data with known subspaces, and explain the results in a report.

    Five claims are measured on noisy tokens from known subspaces: compressing is denoising; attention comes from a
    gradient step (and what the published layer leaves out of it); each layer raises the signal-to-noise ratio by a
    constant factor; the decoder's minus sign reverses the encoder's step; and a sparse-coding step approaches the
    solution of a lasso. This takes less than a minute on one CPU core, and gives the same numbers for the same seed.

    `out` then contains the report theory.html, all numbers in theory.json, and each figure as PNG and PDF.

    Args:
        out: Folder to write to.
        seed: Random seed.
        overwrite: Replace files of these names in a folder that is not empty.
        quiet: Print nothing.

    Returns:
        The path of the report, `out`/theory.html.

    Raises:
        UserError: if the folder is not empty or is a file, the seed is negative, or it cannot be written.
    """
    check_seed(seed)
    folder = new_folder(out, overwrite=overwrite)
    from crate_mae.interpret.claims.report import REPORT_FILE, measure_theory, theory_files

    console = open_console(quiet=quiet)
    console.print_text("Measuring, which takes less than a minute ...")
    return _saved(console, theory_files(measure_theory(seed)), folder, REPORT_FILE)


def _saved(console: CleanConsole, files: Mapping[str, bytes | str], folder: Path, report: str) -> Path:
    """Write the files of a report, and return the path of its HTML file."""
    for name, content in files.items():
        write_whole(folder / name, content)
    console.print_text(f"Saved {folder / report}, with its numbers and figures beside it")
    return folder / report
