"""`crate-mae reconstruct` and `crate-mae eval reconstruction`: completed images, as a picture and in numbers."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from crate_mae.commands.console import (
    check_seed,
    computes,
    new_file,
    print_bad,
    print_if_random,
    progress,
)
from crate_mae.commands.evaluate import Evaluation, compared_with, write_report
from crate_mae.data.numbers import check_whole
from crate_mae.errors import UserError
from crate_mae.models.config import MASK_RATIO
from crate_mae.options import Data, Numbers, OutputPath
from crate_mae.terminal import CleanConsole, open_console

if TYPE_CHECKING:
    from crate_mae.data import ImageSource
    from crate_mae.evaluation.reconstruction import CompletionScore, ReadImages
    from crate_mae.models.autoencoder import MaskedAutoencoder

_PICTURED = 8
_FLAT = "flat patches"
_RATIOS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)


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
    out: OutputPath,
    mask_ratio: float = MASK_RATIO,
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
        seed: Seed for the masks and random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The path of the picture, and the quality of each completion.
    """
    from crate_mae.data import save_picture_grid
    from crate_mae.data.base import evenly_spaced_first
    from crate_mae.evaluation.reconstruction import complete_in_batches, completion_quality, nested_masks, read_images
    from crate_mae.models.features import transform_of
    from crate_mae.models.weights import model_name

    check_seed(seed)
    path = new_file("--out", out, ".png", overwrite=overwrite)
    check_whole("--count", count)
    net, source = _opened(model, images, seed)
    read = read_images(source, transform_of(net.config), evenly_spaced_first(len(source), count), count)
    mask = nested_masks(len(read.images), net.num_patches, mask_ratio, seed)
    completion = complete_in_batches(net, read.images, mask)
    quality = completion_quality(completion, mask, net.config.patch_size)
    rows = list(completion._asdict().items())
    save_picture_grid(rows, path, captions=[f"{psnr:.1f} dB" for psnr in quality.psnr])

    table = Table("image", "PSNR of hidden patches", "SSIM", box=None)
    means = ("mean", quality.psnr.mean(), quality.ssim.mean())
    for name, psnr, ssim in (*zip(read.locations, *quality, strict=True), means):
        table.add_row(name, f"{psnr:.2f} dB", f"{ssim:.3f}")
    console = open_console()
    _print_quality(console, table, net, model_name(model), read)
    console.print_text(f"Saved {path}")
    return Reconstruction(path, read.locations, quality.psnr.tolist(), quality.ssim.tolist())


@computes
def eval_reconstruction(
    model: Data,
    data: Data,
    *,
    out: Path | str | None = None,
    picture: Path | str | None = None,
    mask_ratios: Numbers | None = None,
    count: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    controls: bool = True,
    json: bool = False,
) -> Evaluation:
    """Complete masked images at several mask ratios, and measure the quality of the completions.

    Every call uses the same images and masks. Patches hidden at one ratio stay hidden at larger ones. The mean squared
    error is that of hidden patches, in normalised pixels (the loss of ordinary training) and in units of each patch's
    standard deviation (the loss of --norm-pix-loss); PSNR is that of hidden patches, and SSIM that of the completed
    image. A model trained with --norm-pix-loss predicts patches without brightness and contrast:
    both then come from the original, in all but the second measure, and the output notes it. PSNR has Student's 95%
    interval over images.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or the name of a model.
        data: Images, in any form of data that `crate-mae pretrain` takes.
        out: New .json file for the scores.
        picture: New .png file for a picture of eight of the images at each ratio.
        mask_ratios: Shares of patches to hide; by default, those of 0.5, 0.6, 0.7, 0.75, 0.8, 0.9 and 0.95 that leave a
            patch visible.
        count: Maximum number of images to measure; if there are more, a sample that depends on the seed is used.
        seed: Seed for the masks, the sample and random initialisation.
        batch_size: Images per batch.
        overwrite: Replace existing files.
        controls: Also measure the same network with random initialisation, and flat patches of the mean visible colour.
        json: Print one JSON object on standard output, and everything else on standard error.

    Returns:
        The scores, one row per ratio.

    Raises:
        UserError: for a mistake in the options, model or data; no file is written then.
    """
    from crate_mae.evaluation.probing import data_name, versions
    from crate_mae.evaluation.reconstruction import read_sample
    from crate_mae.models.features import transform_of
    from crate_mae.models.masking import visible_patches
    from crate_mae.models.weights import is_untrained, model_name

    check_seed(seed)
    out = None if out is None else new_file("--out", out, ".json", overwrite=overwrite)
    picture = None if picture is None else new_file("--picture", picture, ".png", overwrite=overwrite)
    check_whole("--count", count)
    check_whole("--batch-size", batch_size)
    if mask_ratios is not None and not mask_ratios:
        raise UserError("--mask-ratios is empty: give at least one.")
    net, source = _opened(model, data, seed)
    read = read_sample(source, transform_of(net.config), count, seed)
    ratios = mask_ratios or tuple(r for r in _RATIOS if visible_patches(net.num_patches, r) > 0)
    console, name = open_console(stderr=json), model_name(model)
    settings = {"images": read.images, "mask_ratios": ratios, "seed": seed, "batch_size": batch_size}
    scores, found = _scores(console, net, name, controls=controls, **settings)
    verdict = _verdict(name, scores, found) if found else None
    _print_quality(console, _table_of_ratios(net, scores, found), net, name, read)
    if verdict is not None:
        console.print_text(verdict)
    report = {
        "probe": "reconstruction",
        "model": name,
        "random_initialisation": is_untrained(name),
        "data": data_name(data, source),
        "images": len(read.images),
        "left_out": [tuple(bad) for bad in read.bad],
        "image_size": net.config.image_size,
        "norm_pix_loss": net.config.norm_pix_loss,
        "seed": seed,
        "results": [asdict(score) for score in scores],
        "controls": [{"model": each, "results": [asdict(score) for score in own]} for each, own in found.items()],
        "versions": versions(),
        "verdict": verdict,
    }
    if picture is not None:
        _save_picture(net, read, scores, seed, picture)
        console.print_text(f"Saved {picture}")
    write_report(console, report, out, json=json)
    return Evaluation(report, out)


def _scores(
    console: CleanConsole, net: "MaskedAutoencoder", name: str, *, controls: bool, **settings: Any
) -> "tuple[list[CompletionScore], dict[str, list[CompletionScore]]]":
    """The scores of a model at each ratio, and those of its controls by their names; `settings` are for both."""
    from crate_mae.evaluation.reconstruction import completion_scores
    from crate_mae.models.classifier import untrained
    from crate_mae.models.completion import flat_patches
    from crate_mae.models.weights import UNTRAINED, is_untrained

    has_twin = controls and not is_untrained(name)
    batches = len(settings["mask_ratios"]) * math.ceil(len(settings["images"]) / settings["batch_size"])
    with progress(console, "Completing images", (1 + controls + has_twin) * batches) as advance:
        score = partial(completion_scores, **settings, on_batch=advance)
        scores, found = score(net), {}
        if has_twin:
            found[f"{name}{UNTRAINED}"] = score(untrained(net.config, settings["seed"]).to(net.mask_token))
        if controls:
            found[_FLAT] = score(net, predict=flat_patches)
    return scores, found


def _opened(model: Any, data: Any, seed: int) -> "tuple[MaskedAutoencoder, ImageSource]":
    from crate_mae.data import open_source
    from crate_mae.data.dataset import default_generator_seeded
    from crate_mae.models.weights import load_autoencoder

    source = open_source(data)
    with default_generator_seeded(seed):
        return load_autoencoder(model), source


def _print_quality(
    console: CleanConsole, table: Table, net: "MaskedAutoencoder", name: str, read: "ReadImages"
) -> None:
    """Print a table, and what is to be known of its numbers."""
    from crate_mae.models.weights import is_untrained

    console.print(table)
    if net.config.norm_pix_loss:
        console.print_text("Brightness and contrast of each patch come from the original: targets were normalised.")
    print_if_random(console, name, is_untrained(name))
    print_bad(console, read.bad)


def _table_of_ratios(
    net: "MaskedAutoencoder", scores: "list[CompletionScore]", controls: "Mapping[str, list[CompletionScore]]"
) -> Table:
    table = Table("hidden", "by", "error", "error, normalised patches", "PSNR (95%)", "SSIM", box=None)
    for score, *others in zip(scores, *controls.values(), strict=True):
        hidden = f"{100 * score.mask_ratio:g}% ({score.hidden} of {net.num_patches} patches)"
        for name, each in zip(("the model", *map(_short, controls)), (score, *others), strict=True):
            interval = "" if each.psnr_half_width is None else f" ± {each.psnr_half_width:.2f}"
            psnr = f"{each.psnr:.2f}{interval} dB"
            table.add_row(hidden, name, f"{each.mse:.4g}", f"{each.normalised_mse:.4g}", psnr, f"{each.ssim:.3f}")
            hidden = ""
    return table


def _verdict(name: str, scores: "list[CompletionScore]", controls: "Mapping[str, list[CompletionScore]]") -> str:
    """Whether training has helped, at the ratio nearest to that of training: PSNR compared by its intervals."""
    at = min(range(len(scores)), key=lambda i: abs(scores[i].mask_ratio - MASK_RATIO))
    score, comparisons = scores[at], []
    for control, others in controls.items():
        difference = score.psnr - others[at].psnr
        widths = [math.inf if width is None else width for width in (score.psnr_half_width, others[at].psnr_half_width)]
        overlap = abs(difference) <= sum(widths)
        comparisons.append(compared_with(_short(control), difference, ".2f", "dB", overlap=overlap))
    where = f"With {100 * score.mask_ratio:g}% hidden, completions of {name} ({score.psnr:.2f} dB) are "
    return f"{where}{' and '.join(comparisons)}."


def _short(control: str) -> str:
    return control if control == _FLAT else "random initialisation"


def _save_picture(
    net: "MaskedAutoencoder", read: "ReadImages", scores: "list[CompletionScore]", seed: int, path: Path
) -> None:
    """Save some of the images at each mask ratio: what the model sees, and its completion."""
    from crate_mae.data import save_picture_grid
    from crate_mae.data.base import evenly_spaced
    from crate_mae.evaluation.reconstruction import complete_in_batches, nested_masks

    count, rows = len(read.images), []
    shown = evenly_spaced(count, _PICTURED)
    for score in scores:
        mask = nested_masks(count, net.num_patches, score.mask_ratio, seed)
        completion = complete_in_batches(net, read.images[shown], mask[shown])
        if not rows:
            rows.append(("original", completion.original))
        rows += [(f"{100 * score.mask_ratio:g}% hidden", completion.masked), ("completed", completion.completed)]
    save_picture_grid(rows, path)
