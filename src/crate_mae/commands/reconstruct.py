"""`crate-mae reconstruct`: mask images, complete them, and save a picture of the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from crate_mae.commands.console import (
    OWN_STATISTICS,
    check_seed,
    computes,
    new_file,
    print_bad,
    print_random_initialisation,
)
from crate_mae.data.numbers import check_whole
from crate_mae.training.options import Data


@dataclass(frozen=True)
class Reconstruction:
    """Result of `reconstruct`.

    Attributes:
        path: of the picture.
        images: locations of its images, from left to right.
        psnr: of each image's hidden patches, in decibels.
        ssim: of each completed picture, at most 1.
    """

    path: Path
    images: list[str]
    psnr: list[float]
    ssim: list[float]


@computes
def reconstruct(
    model: Data,
    images: Data,
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    mask_ratio: float = 0.75,
    count: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Reconstruction:
    """Mask images, complete them, and save a picture: original, masked, prediction, completed.

    The prediction is that of hidden patches; the completed image has it in their place. For a model trained with
    normalised targets, brightness and contrast of each patch come from the original, and the output notes it.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or the name of a model.
        images: An image, a folder of images, or any other form of data that `crate-mae pretrain` takes.
        out: New .png file for the picture.
        mask_ratio: Share of patches to hide.
        count: Number of images, evenly spaced among all.
        seed: Seed of the masks and of random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The path of the picture, and the quality of each completion.
    """
    from crate_mae.data import evaluation_transform, open_source, save_picture_grid
    from crate_mae.data.base import spread
    from crate_mae.data.dataset import default_generator_seeded
    from crate_mae.evaluation.reconstruction import complete_in_batches, completion_quality, nested_masks, read_images
    from crate_mae.models.weights import is_untrained, load_autoencoder, model_name
    from crate_mae.terminal import open_console

    check_seed(seed)
    path = new_file("--out", out, ".png", overwrite=overwrite)
    check_whole("--count", count)
    source = open_source(images)
    with default_generator_seeded(seed):
        net = load_autoencoder(model)
    config = net.config
    transform = evaluation_transform(config.image_size, config.in_chans, config.mean, config.std)
    read = read_images(source, transform, spread(len(source), count), count)
    mask = nested_masks(len(read.images), net.num_patches, mask_ratio, seed)
    completion = complete_in_batches(net, read.images, mask)
    quality = completion_quality(completion, mask, config.patch_size)
    rows = list(zip(completion._fields, completion, strict=True))
    save_picture_grid(rows, path, captions=[f"{psnr:.1f} dB" for psnr in quality.psnr])

    result = Reconstruction(path, read.locations, quality.psnr.tolist(), quality.ssim.tolist())
    console = open_console()
    console.print(_table(result))
    if config.norm_pix_loss:
        console.print(OWN_STATISTICS, soft_wrap=True, markup=False)
    if is_untrained(name := model_name(model)):
        print_random_initialisation(console, name)
    print_bad(console, read.bad)
    console.print(f"Saved {path}", soft_wrap=True, markup=False)
    return result


def _table(result: Reconstruction) -> Table:
    table = Table("image", "PSNR of hidden patches", "SSIM", box=None)
    for name, psnr, ssim in zip(result.images, result.psnr, result.ssim, strict=True):
        table.add_row(Text(name), f"{psnr:.2f} dB", f"{ssim:.3f}")
    count = len(result.images)
    table.add_row("mean", f"{sum(result.psnr) / count:.2f} dB", f"{sum(result.ssim) / count:.3f}")
    return table
