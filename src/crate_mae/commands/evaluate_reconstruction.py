"""`crate-mae eval reconstruction`: quality of completed images at several mask ratios."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.progress import Progress
from rich.table import Table

from crate_mae.commands.console import (
    OWN_STATISTICS,
    check_seed,
    computes,
    new_file,
    print_bad,
    print_random_initialisation,
)
from crate_mae.commands.evaluate import Evaluation, write_report
from crate_mae.data.numbers import check_whole
from crate_mae.terminal import CleanConsole, open_console
from crate_mae.training.options import Data

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from crate_mae.evaluation.reconstruction import CompletionScore
    from crate_mae.models.autoencoder import MaskedAutoencoder

Ratios = Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())]

_PICTURED = 8
_RATIOS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)


@computes
def eval_reconstruction(
    model: Data,
    data: Data,
    *,
    out: Path | str | None = None,
    picture: Path | str | None = None,
    mask_ratios: Ratios | None = None,
    count: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    json: bool = False,
) -> Evaluation:
    """Complete masked images at several mask ratios, and measure the quality of the completions.

    Every call uses the same images and masks. Patches hidden at one ratio stay hidden at larger ones. The mean squared
    error is that of hidden patches, in normalised pixels (the loss of ordinary training) and in units of each patch's
    standard deviation (the loss of --norm-pix-loss); PSNR is that of hidden patches, and SSIM that of the completed
    image. A model trained with --norm-pix-loss predicts patches without brightness and contrast:
    both then come from the original, in all but the second measure, and the output notes it.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or the name of a model.
        data: Images, in any form of data that `crate-mae pretrain` takes.
        out: New .json file for the scores.
        picture: New .png file for a picture of eight of the images at each ratio.
        mask_ratios: Shares of patches to hide; by default 0.5, 0.6, 0.7, 0.75, 0.8, 0.9 and 0.95, as far as they leave
            a patch visible.
        count: Largest number of images to measure; of more images, a fixed pseudo-random sample is used.
        seed: Seed of the masks, of that sample, and of random initialisation.
        batch_size: Images per batch.
        overwrite: Replace existing files.
        json: Print one JSON object on the standard output, and everything else on the standard error.

    Returns:
        The scores, one row per ratio.

    Raises:
        UserError: for a mistake in the options, model or data; no file is written then.
    """
    from crate_mae.data import open_source
    from crate_mae.data.base import fixed_sample
    from crate_mae.data.dataset import default_generator_seeded
    from crate_mae.errors import UserError
    from crate_mae.evaluation.backbones import open_backbone
    from crate_mae.evaluation.probing import data_name, versions
    from crate_mae.evaluation.reconstruction import read_images
    from crate_mae.models.masking import visible_patches
    from crate_mae.models.weights import is_untrained, load_autoencoder, model_name

    check_seed(seed)
    out = None if out is None else new_file("--out", out, ".json", overwrite=overwrite)
    picture = None if picture is None else new_file("--picture", picture, ".png", overwrite=overwrite)
    check_whole("--count", count)
    check_whole("--batch-size", batch_size)
    if mask_ratios is not None and not mask_ratios:
        raise UserError("--mask-ratios is empty: give at least one.")
    source = open_source(data)
    with default_generator_seeded(seed):
        net = load_autoencoder(model)
    ratios = mask_ratios or tuple(r for r in _RATIOS if visible_patches(net.num_patches, r) > 0)
    read = read_images(source, open_backbone(net).transform(), fixed_sample(len(source), count, seed), count)
    console = open_console(stderr=json)
    scores = _scores_shown(console, net, read.images, ratios, seed=seed, batch_size=batch_size)
    _show(console, net, scores)
    name = model_name(model)
    is_random = is_untrained(name)
    if is_random:
        print_random_initialisation(console, name)
    print_bad(console, read.bad)
    report = {
        "probe": "reconstruction",
        "model": name,
        "fresh_weights": is_random,
        "data": data_name(data, source),
        "images": len(read.images),
        "left_out": [tuple(bad) for bad in read.bad],
        "image_size": net.config.image_size,
        "norm_pix_loss": net.config.norm_pix_loss,
        "seed": seed,
        "results": [asdict(score) for score in scores],
        "versions": versions(),
    }
    if picture is not None:
        _save_picture(net, read.images, scores, seed, picture)
        console.print(f"Saved {picture}", soft_wrap=True, markup=False)
    write_report(console, report, out, json=json)
    return Evaluation(report, out)


def _scores_shown(
    console: CleanConsole,
    net: "MaskedAutoencoder",
    images: "Float[Tensor, 'b c hh ww']",
    mask_ratios: tuple[float, ...],
    *,
    seed: int,
    batch_size: int,
) -> "list[CompletionScore]":
    """`evaluation.reconstruction.completion_scores` with a progress bar."""
    from crate_mae.evaluation.reconstruction import completion_scores

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Completing images", total=len(mask_ratios) * -(-len(images) // batch_size))
        return completion_scores(
            net, images, mask_ratios, seed=seed, batch_size=batch_size, on_batch=lambda: progress.advance(task)
        )


def _show(console: CleanConsole, net: "MaskedAutoencoder", scores: "list[CompletionScore]") -> None:
    table = Table("hidden", "error", "error, normalised patches", "PSNR", "SSIM", box=None)
    for score in scores:
        table.add_row(
            f"{100 * score.mask_ratio:g}% ({score.hidden} of {net.num_patches} patches)",
            f"{score.mse:.4g}",
            f"{score.normalised_mse:.4g}",
            f"{score.psnr:.2f} dB",
            f"{score.ssim:.3f}",
        )
    console.print(table)
    if net.config.norm_pix_loss:
        console.print(OWN_STATISTICS, soft_wrap=True, markup=False)


def _save_picture(
    net: "MaskedAutoencoder", images: "Float[Tensor, 'b c hh ww']", scores: Any, seed: int, path: Path
) -> None:
    """Save some of the images at each mask ratio: what the model sees, and its completion."""
    from crate_mae.data import save_picture_grid
    from crate_mae.data.base import evenly_spaced
    from crate_mae.evaluation.reconstruction import complete_in_batches, nested_masks

    shown, rows = evenly_spaced(len(images), _PICTURED), []
    for score in scores:
        mask = nested_masks(len(images), net.num_patches, score.mask_ratio, seed)
        completion = complete_in_batches(net, images[shown], mask[shown])
        if not rows:
            rows.append(("original", completion.original))
        rows += [(f"{100 * score.mask_ratio:g}% hidden", completion.masked), ("completed", completion.completed)]
    save_picture_grid(rows, path)
