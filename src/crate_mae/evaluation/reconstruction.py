"""How well a model completes images: masks, completions, and their quality at each mask ratio."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from crate_mae.data import BadImage, ImageSource
from crate_mae.data.base import fixed_sample, none_readable, read_all
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError
from crate_mae.evaluation.probes import half_width
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.completion import Completion, complete, completion_of, predicted_patches
from crate_mae.models.config import ModelConfig
from crate_mae.models.features import evaluating
from crate_mae.models.masking import mean_over_hidden, patch_statistics, patchify, random_mask

# In decibels: a root mean squared error of 1e-5. That of an exact completion is infinite, and so would be every mean.
LARGEST_PSNR = 100.0

Predict = Callable[[MaskedAutoencoder, Float[Tensor, "b c hh ww"], Bool[Tensor, "b n"]], Float[Tensor, "b n q"]]


class ReadImages(NamedTuple):
    """Prepared images of a source.

    Attributes:
        images: normalised.
        locations: where each image is.
        bad: the images that could not be read, which are left out.
    """

    images: Float[Tensor, "b c hh ww"]
    locations: list[str]
    bad: list[BadImage]


def read_images(source: ImageSource, transform: Preparation, indices: Iterable[int], count: int) -> ReadImages:
    """Read the first `count` readable images among the given indices.

    Raises:
        UserError: if none can be read.
    """
    images, bad = read_all(source, indices, transform, count)
    if not images:
        raise none_readable(f"No image of {source.name}", bad[0])
    return ReadImages(torch.stack(list(images.values())), [source.location(i) for i in images], bad)


def read_sample(source: ImageSource, transform: Preparation, count: int, seed: int = 0) -> ReadImages:
    """Read a fixed pseudo-random sample of `count` images, or all if there are not more; see `read_images`."""
    return read_images(source, transform, fixed_sample(len(source), count, seed), count)


@dataclass(frozen=True)
class CompletionScore:
    """Means over images, of hidden patches only except for SSIM.

    Attributes:
        mask_ratio: share of patches to hide.
        hidden: number of hidden patches per image.
        mse: mean squared error of pixels, normalised as for the model: the training loss without
            `norm_pix_loss`.
        normalised_mse: the same in units of each patch's own standard deviation: the training loss with
            `norm_pix_loss`. Nearly flat patches have the largest weight in it.
        psnr: of the hidden patches, in decibels, that of no image more than `LARGEST_PSNR`.
        ssim: of the completed picture, at most 1.
        psnr_half_width: half of the 95% interval of the mean of `psnr`; None for a single image.
    """

    mask_ratio: float
    hidden: int
    mse: float
    normalised_mse: float
    psnr: float
    ssim: float
    psnr_half_width: float | None


def completion_scores(
    model: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    mask_ratios: Sequence[float],
    *,
    seed: int = 0,
    batch_size: int = 64,
    predict: Predict = predicted_patches,
    on_batch: Callable[[], object] | None = None,
) -> list[CompletionScore]:
    """Measure completions of the same images at several mask ratios.

    Masks are nested: patches that are hidden at one ratio are hidden at every larger one. They depend only on the seed
    and the position of the image, so scores do not depend on the batch size.

    Args:
        model: if its targets are normalised, each patch's mean and standard deviation come from the original.
        images: normalised.
        mask_ratios: in (0, 1).
        seed: of the masks.
        batch_size: number of images completed at once.
        predict: what completes them; by default the model, and as a control `models.completion.flat_patches`.
        on_batch: called after each batch, for a progress bar.

    Raises:
        UserError: for a ratio that hides nothing or leaves nothing visible, or completions that are not finite.
    """
    scores: list[CompletionScore] = []
    for ratio in mask_ratios:
        masks = nested_masks(len(images), model.num_patches, ratio, seed)
        batches: list[dict[str, Tensor]] = []
        for batch, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True):
            with evaluating(model):
                batches.append(_scores_of_images(model.config, batch, mask, predict(model, batch, mask)))
            if on_batch is not None:
                on_batch()
        of_images = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
        means = {name: values.mean().item() for name, values in of_images.items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError(
                "The model's completions are not finite numbers: its weights contain NaN, or values overflow.\n"
                "Use an earlier checkpoint of the run."
            )
        half = half_width(of_images["psnr"].tolist()) if len(images) > 1 else None
        scores.append(CompletionScore(ratio, int(masks[0].sum()), **means, psnr_half_width=half))
    return scores


def nested_masks(images: int, num_patches: int, mask_ratio: float, seed: int) -> Bool[Tensor, "b n"]:
    """Nested masks: those at a larger ratio hide everything that those at a smaller ratio hide.

    Raises:
        UserError: for a ratio that hides nothing, or leaves nothing visible.
    """
    return random_mask(images, num_patches, mask_ratio, torch.Generator().manual_seed(seed))


def complete_in_batches(
    model: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], masks: Bool[Tensor, "b n"], batch_size: int = 64
) -> Completion:
    """Complete any number of images in batches, in `eval()` mode; see `models.completion.complete`."""
    with evaluating(model):
        batches = zip(images.split(batch_size), masks.split(batch_size), strict=True)
        parts = [complete(model, batch, mask) for batch, mask in batches]
    return Completion(*(torch.cat(pictures) for pictures in zip(*parts, strict=True)))


class CompletionQuality(NamedTuple):
    """The quality of completed pictures, one number per image.

    Attributes:
        psnr: peak signal-to-noise ratio of the hidden patches alone, in decibels: -10 log10 of the mean squared error
            of pixels in [0, 1], at most `LARGEST_PSNR`. Visible patches, which are copied, do not count.
        ssim: structural similarity of the completed picture to the original, at most 1. It compares neighbourhoods, so
            visible patches do count.
    """

    psnr: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]


def completion_quality(completion: Completion, mask: Bool[Tensor, "b n"], patch_size: int) -> CompletionQuality:
    """Compare completed pictures with their originals.

    SSIM uses the usual Gaussian window of 11 pixels (sigma 1.5), or one of 5 pixels (sigma 0.5) on images smaller than
    16 pixels, which the usual one does not fit.

    Args:
        completion: pictures in [0, 1].
        mask: true = hidden; at least one patch in every image.
        patch_size: side of a patch in pixels.
    """
    targets, predictions = (patchify(x, patch_size) for x in (completion.original, completion.prediction))
    sigma = 1.5 if min(completion.original.shape[-2:]) >= 16 else 0.5
    psnr = [
        peak_signal_noise_ratio(prediction[hidden], target[hidden], data_range=1.0).clamp(max=LARGEST_PSNR)
        for prediction, target, hidden in zip(predictions, targets, mask, strict=True)
    ]
    ssim = structural_similarity_index_measure(
        completion.completed, completion.original, sigma=sigma, data_range=1.0, reduction="none"
    )
    return CompletionQuality(torch.stack(psnr), torch.as_tensor(ssim).reshape(len(psnr)))


def _scores_of_images(
    config: ModelConfig,
    images: Float[Tensor, "b c hh ww"],
    mask: Bool[Tensor, "b n"],
    prediction: Float[Tensor, "b n q"],
) -> dict[str, Float[Tensor, " b"]]:
    """The measures of `CompletionScore`, by their names, for each image."""
    target = patchify(images, config.patch_size)
    error = (prediction - target).square().mean(dim=-1)
    variance = patch_statistics(target)[1].square()[..., 0]
    mse, normalised_mse = (mean_over_hidden(each, mask) for each in (error, error / variance))
    quality = completion_quality(completion_of(config, images, mask, prediction), mask, config.patch_size)
    return {"mse": mse, "normalised_mse": normalised_mse, **quality._asdict()}
