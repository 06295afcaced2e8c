"""`crate-mae theory`: the claims that the network is derived from, tested where their assumptions hold."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crate_mae.commands.console import check_seed, computes
from crate_mae.data.files import output_path, refuse_used_folder


@computes
def theory(
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Test the theory on data with known subspaces, and explain the results on a page.

    Five claims are measured on noisy tokens from known subspaces: compressing is denoising; attention comes from a
    gradient step (and what the published layer leaves out of it); each layer raises the signal-to-noise ratio by a
    constant factor; the decoder's minus sign reverses the encoder's step; and a sparse-coding step approaches the
    solution of a lasso. This takes less than a minute on one CPU core, and gives the same numbers for the same seed.

    `out` then contains the page theory.html, all numbers in theory.json, and each figure as PNG and PDF.

    Args:
        out: Folder to write to.
        seed: Seed of all randomness.
        overwrite: Replace files of these names in a folder that is not empty.
        quiet: Print nothing.

    Returns:
        The path of the page, `out`/theory.html.

    Raises:
        UserError: if the folder is not empty or is a file, the seed is negative, or it cannot be written.
    """
    folder = output_path("--out", out)
    check_seed(seed)
    refuse_used_folder(folder, overwrite=overwrite)
    from crate_mae.data.files import write_whole
    from crate_mae.interpret.claims.page import PAGE, measure_theory, theory_files
    from crate_mae.terminal import open_console

    console = open_console(quiet=quiet)
    console.print("Measuring, which takes less than a minute ...")
    for name, content in theory_files(measure_theory(seed)).items():
        write_whole(folder / name, content)
    console.print(f"Saved {folder / PAGE}, with its numbers and figures beside it", markup=False, soft_wrap=True)
    return folder / PAGE
