"""`crate-mae reconstruct`: mask images, complete them, and look."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` saved and measured.

    Attributes:
        path: the picture.
        images: which images it shows, from top to bottom.
        psnr: of each image's hidden patches, in decibels.
        ssim: of each pasted picture, at most 1.
    """

    path: Path
    images: list[str]
    psnr: list[float]
    ssim: list[float]


def reconstruct(
    model: str | Path,
    images: str | Path,
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    mask_ratio: float = 0.75,
    count: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Reconstruction:
    """Mask images, complete them, and save the picture: original, masked, completed, pasted.

    "Completed" is what the model predicts everywhere; "pasted" keeps the visible patches of the original. A model
    trained with normalised targets gets each patch's brightness and contrast from the original, and the output says so.

    Args:
        model: a run folder, a folder with model.safetensors and config.json, hf:user/name, or a model's name.
        images: an image, a folder of images, or any other form of data that `crate-mae pretrain` takes.
        out: the picture to write, a .png file.
        mask_ratio: share of patches to hide.
        count: how many images to show, from the first on.
        seed: decides which patches are hidden.
        overwrite: replace a picture that is there.

    Returns:
        The picture's path, and the quality of each completion.
    """
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from crate_mae.data import UnreadableImage, evaluation_transform, open_source, save_picture_grid
    from crate_mae.errors import UserError
    from crate_mae.evaluation.completion_quality import completion_quality
    from crate_mae.models.completion import complete
    from crate_mae.models.masking import random_mask
    from crate_mae.models.presets import list_models
    from crate_mae.models.weights import load

    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must name a .png file.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already. Name another file, or add --overwrite.")
    if count < 1:
        raise UserError(f"--count is {count}, but must be at least 1.")
    source = open_source(images)
    net = load(model)
    config = net.config
    transform = evaluation_transform(config.image_size, config.in_chans, config.mean, config.std)
    names, pixels = [], []
    unreadable = []
    for i in range(len(source)):
        if len(pixels) == count:
            break
        try:
            pixels.append(transform(source.read(i)))
            names.append(source.location(i))
        except UnreadableImage as error:
            unreadable.append(str(error))
    if not pixels:
        raise UserError(f"No image of {images} can be read. The first is\n{unreadable[0]}")
    pixels = torch.stack(pixels)
    mask = random_mask(len(pixels), net.num_patches, mask_ratio, torch.Generator().manual_seed(seed))
    if not mask.any():
        raise UserError(f"--mask-ratio {mask_ratio} hides none of {net.num_patches} patches, so nothing is completed.")
    completion = complete(net, pixels, mask)
    quality = completion_quality(completion, mask, config.patch_size)
    rows = list(zip(completion._fields, completion, strict=True))
    save_picture_grid(rows, out, captions=[f"{psnr:.1f} dB" for psnr in quality.psnr])

    table = Table("image", "PSNR of hidden patches", "SSIM", box=None)
    for name, psnr, ssim in zip(names, quality.psnr, quality.ssim, strict=True):
        table.add_row(Text(name), f"{psnr:.2f} dB", f"{ssim:.3f}")
    table.add_row("mean", f"{quality.psnr.mean():.2f} dB", f"{quality.ssim.mean():.3f}")
    console = Console(highlight=False)
    console.print(table)
    if config.norm_pix_loss:
        console.print("Brightness and contrast of each patch come from the original: targets were normalised.")
    if str(model) in list_models():
        console.print(f"{model} has fresh, untrained weights: name a run to see what training gives.")
    for reason in unreadable:
        console.print(f"Left out: {reason}", soft_wrap=True, markup=False)
    console.print(f"Saved {out}", soft_wrap=True, markup=False)
    return Reconstruction(out, names, quality.psnr.tolist(), quality.ssim.tolist())
