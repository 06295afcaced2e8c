"""`crate-mae convert`: published weights, and others' files, as folders of this library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from crate_mae.errors import UserError


@dataclass(frozen=True)
class Converted:
    """What `convert` found and wrote.

    Attributes:
        path: the folder.
        found: what the file was, in words.
        notes: what was taken off, assumed or left out, and why.
    """

    path: Path
    found: str
    notes: list[str]


def convert(
    file: Path | str,
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    threshold: float | None = None,
    norm_pix_loss: bool | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Converted:
    """Convert published weights into a folder that every command takes.

    - Files of the official CRATE-MAE (.pth, .pt, .safetensors), with or without the prefixes and wrappers that training
      leaves: a folder with model.safetensors and config.json.
    - Files of the official CRATE classifiers: their encoder, in timm's layout, for embed, eval and timm.
    - Folders of this library and of transformers: a folder of this library.

    Names and shapes of all tensors are checked. What is found, assumed and left out is said. Pickles are opened so that
    they cannot run code. The folder is written whole or not at all.

    Args:
        file: the file or folder.
        out: the folder to make. It must not be there, or be empty.
        num_heads: heads of the encoder and decoder, which official files do not tell. By default those of the published
            model of the same width.
        image_size: height and width that the model was made for. By default a square, from the table of positions.
        threshold: lambda of the ISTA step. By default that of the official code: 0.5, and 0.1 of classifiers.
        norm_pix_loss: whether the targets were normalised patches. By default no.
        mean: what was subtracted from each channel. By default ImageNet's.
        std: what each channel was then divided by. By default ImageNet's.

    Returns:
        The folder, what was found, and what was done to it.

    Raises:
        UserError: for a file that is damaged, unknown or does not fit, or a folder that is there.
    """
    from rich.console import Console

    from crate_mae.data.files import refuse_used_folder
    from crate_mae.models.conversion import understand
    from crate_mae.training.files import whole_folder

    file, out = Path(file), Path(out)
    refuse_used_folder(out)
    if not file.exists():
        raise UserError(f"There is no file {file}.")
    given: dict[str, Any] = {"image_size": image_size, "threshold": threshold, "norm_pix_loss": norm_pix_loss}
    given |= {"mean": mean, "std": std}
    settings = {key: value for key, value in given.items() if value is not None}
    conversion = understand(file, num_heads, **settings)
    with whole_folder(out) as folder:
        conversion.write(folder)
    console = Console(highlight=False)
    console.print(f"Found {conversion.found}.", soft_wrap=True, markup=False)
    for note in conversion.notes:
        console.print(f"  {note}", soft_wrap=True, markup=False)
    console.print(f"Saved {out}.", soft_wrap=True, markup=False)
    return Converted(out, conversion.found, conversion.notes)
