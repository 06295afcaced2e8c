"""`crate-mae theory`: the claims that the network is derived from, tested where their assumptions hold."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crate_mae.data.files import refuse_used_folder
from crate_mae.errors import UserError


def theory(
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Test the theory on data with known subspaces, and explain what came out on a page.

    Five claims are measured on noisy tokens of known subspaces: that compressing is denoising, that attention comes
    from a gradient step (and what the published layer leaves out of it), that each layer raises the signal-to-noise
    ratio by a constant factor, that the decoder's minus sign undoes the encoder's step, and that a sparse-coding step
    approaches the solution of a lasso. It takes less than a minute on one CPU core, and gives the same numbers for the
    same seed.

    `out` then holds theory.html, to be read; theory.json, with all numbers; and each figure as PNG and PDF.

    Args:
        out: The folder to write to.
        seed: Of all randomness.
        overwrite: Replace files of these names in a folder that is not empty.
        quiet: Show nothing.

    Returns:
        The page, `out`/theory.html.

    Raises:
        UserError: if the folder is not empty or is a file, the seed is negative, or it cannot be written.
    """
    folder = Path(out)
    _refuse(folder, seed, overwrite=overwrite)
    from rich.console import Console

    from crate_mae.data.files import write_whole
    from crate_mae.drawing.style import encode
    from crate_mae.interpret.theory.experiments import measure_theory
    from crate_mae.interpret.theory.figures import draw_theory
    from crate_mae.interpret.theory.page import write_page
    from crate_mae.interpret.theory.sections import write_sections

    console = Console(highlight=False, quiet=quiet)
    console.print("Measuring, which takes less than a minute ...")
    results = measure_theory(seed)
    figures = draw_theory(results)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files |= {f"{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["theory.json"] = results.to_json().encode()
    files["theory.html"] = write_page(results, write_sections(results), pictures).encode()
    for name, content in files.items():
        write_whole(folder / name, content)
    page = folder / "theory.html"
    console.print(f"Saved {page}, with its numbers and figures beside it", markup=False, soft_wrap=True)
    return page


def _refuse(folder: Path, seed: int, *, overwrite: bool) -> None:
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or more.")
    refuse_used_folder(folder, overwrite=overwrite)
