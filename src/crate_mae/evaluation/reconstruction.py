"""How well a model completes images, over mask ratios."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crate_mae.data import BadImage, ImageSource, UnreadableImage
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError
from crate_mae.evaluation.completion_quality import completion_quality
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.completion import Completion, complete, completion_of, predicted_patches
from crate_mae.models.features import evaluating
from crate_mae.models.masking import patch_statistics, patchify, random_mask


class ReadImages(NamedTuple):
    """Images of a source, prepared.

    Attributes:
        images: normalised.
        locations: where each is.
        bad: those that could not be read, and so are left out.
    """

    images: Float[Tensor, "b c hh ww"]
    locations: list[str]
    bad: list[BadImage]


def read_images(source: ImageSource, transform: Preparation, indices: Iterable[int], count: int) -> ReadImages:
    """The first `count` of the numbered images that can be read.

    Raises:
        UserError: if none can be read.
    """
    images: list[Tensor] = []
    locations: list[str] = []
    bad: list[BadImage] = []
    for i in indices:
        if len(images) == count:
            break
        try:
            images.append(transform(source.read(i)))
            locations.append(source.location(i))
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    if not images:
        raise UserError(f"No image of {source.name} can be read. The first is\n{bad[0].location}: {bad[0].reason}")
    return ReadImages(torch.stack(images), locations, bad)


@dataclass(frozen=True)
class CompletionScore:
    """Means over images, of hidden patches alone but for SSIM.

    Attributes:
        mask_ratio: share of patches to hide.
        hidden: how many patches of each image that is.
        mse: mean squared error of pixels, normalised as the model takes them: the loss of training without
            `norm_pix_loss`.
        normalised_mse: the same in units of each patch's own standard deviation: the loss of training with
            `norm_pix_loss`. Nearly flat patches weigh most in it.
        psnr: of the hidden patches, in decibels.
        ssim: of the picture with the completion pasted into its holes, at most 1.
    """

    mask_ratio: float
    hidden: int
    mse: float
    normalised_mse: float
    psnr: float
    ssim: float


def completion_scores(
    model: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    mask_ratios: Sequence[float],
    *,
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[], object] | None = None,
) -> list[CompletionScore]:
    """Measure completions of the same images at several mask ratios.

    Each image's masks are nested: what is hidden at one ratio is hidden at every larger one. They depend on the seed
    and the image's place alone, so batches of any size give the same scores.

    Args:
        model: its targets may be normalised; each patch's mean and standard deviation then come from the original.
        images: normalised.
        mask_ratios: in (0, 1).
        seed: of the masks.
        batch_size: images that are completed at once.
        on_batch: told after each batch, for a progress bar.

    Raises:
        UserError: for a ratio that hides no patch.
    """
    scores: list[CompletionScore] = []
    for ratio in mask_ratios:
        masks = nested_masks(len(images), model.num_patches, ratio, seed)
        rows: list[Tensor] = []
        for batch, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True):
            rows.append(_scores_of_images(model, batch, mask))
            if on_batch is not None:
                on_batch()
        scores.append(CompletionScore(ratio, int(masks[0].sum()), *torch.cat(rows).double().mean(dim=0).tolist()))
    return scores


def nested_masks(images: int, num_patches: int, mask_ratio: float, seed: int) -> Bool[Tensor, "b n"]:
    """Masks of which those at a larger ratio hide all that those at a smaller one hide.

    Raises:
        UserError: for a ratio that hides no patch, or is not in (0, 1).
    """
    masks = random_mask(images, num_patches, mask_ratio, torch.Generator().manual_seed(seed))
    if not masks.any():
        raise UserError(f"A mask ratio of {mask_ratio} hides none of {num_patches} patches: nothing is completed.")
    return masks


def complete_in_batches(
    model: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], masks: Bool[Tensor, "b n"], batch_size: int = 64
) -> Completion:
    """`models.completion.complete` for any number of images, in `eval()`."""
    with evaluating(model):
        batches = zip(images.split(batch_size), masks.split(batch_size), strict=True)
        parts = [complete(model, batch, mask) for batch, mask in batches]
    return Completion(*(torch.cat(pictures) for pictures in zip(*parts, strict=True)))


def _scores_of_images(
    model: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, "b 4"]:
    """The four measures of each image."""
    config = model.config
    with evaluating(model):
        prediction = predicted_patches(model, images, mask)
        target = patchify(images, config.patch_size)
        error = (prediction - target).square()
        _, std = patch_statistics(target)
        hidden = mask / mask.sum(dim=1, keepdim=True)
        mse, normalised_mse = ((each.mean(dim=-1) * hidden).sum(dim=1) for each in (error, error / std.square()))
        quality = completion_quality(completion_of(config, images, mask, prediction), mask, config.patch_size)
    return torch.stack([mse, normalised_mse, quality.psnr, quality.ssim], dim=1)
