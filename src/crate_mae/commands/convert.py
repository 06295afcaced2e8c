"""`crate-mae convert`: convert published weights and files of other libraries to model folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from crate_mae.commands.console import computes
from crate_mae.data.files import output_path, path_of, refuse_used_folder, whole_folder
from crate_mae.errors import UserError
from crate_mae.terminal import open_console


@dataclass(frozen=True)
class Converted:
    """Result of `convert`.

    Attributes:
        path: of the folder.
        found: description of the file.
        notes: what was removed, assumed or left out, and why.
    """

    path: Path
    found: str
    notes: list[str]


@computes
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
    """Convert published weights to a model folder that every command accepts.

    - Files of the official CRATE-MAE (.pth, .pt, .safetensors), with or without the prefixes and wrappers of training,
      become a folder with model.safetensors and config.json.
    - Files of the official CRATE classifiers become their encoder in the layout of timm, for embed, eval and timm.
    - Folders of this library and of transformers become a folder of this library.

    Names and shapes of all tensors are checked. The command prints what it found, assumed and left out. Pickles are
    opened so that they cannot run code. The folder is written completely or not at all.

    Args:
        file: File or folder to convert.
        out: New or empty folder for the model.
        num_heads: Heads of the encoder and decoder, which official files do not contain; by default those of the
            published model of the same width.
        image_size: Height and width of the model's images; by default a square, from the position embeddings.
        threshold: lambda of the ISTA step; by default that of the official code: 0.5, and 0.1 for classifiers.
        norm_pix_loss: Whether the targets were normalised patches; by default no.
        mean: Mean that was subtracted from each channel; by default that of ImageNet.
        std: Standard deviation by which each channel was divided; by default that of ImageNet.

    Returns:
        The folder, a description of the file, and notes on the conversion.

    Raises:
        UserError: for a file that is damaged, unknown or does not fit, or a folder that is not empty.
    """
    from crate_mae.models.official import understand

    file, out = path_of("FILE", file), output_path("--out", out)
    refuse_used_folder(out)
    if not file.exists():
        raise UserError(f"{file} does not exist.")
    given: dict[str, Any] = {"image_size": image_size, "threshold": threshold, "norm_pix_loss": norm_pix_loss}
    given |= {"mean": mean, "std": std}
    conversion = understand(file, num_heads, **{key: value for key, value in given.items() if value is not None})
    with whole_folder(out) as folder:
        conversion.write(folder)
    console = open_console()
    console.say(f"Found {conversion.found}.")
    for note in conversion.notes:
        console.say(f"  {note}")
    console.say(f"Saved {out}.")
    return Converted(out, conversion.found, conversion.notes)
