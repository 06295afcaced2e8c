"""Completed pictures: predictions put back into pixels that can be looked at."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import patch_statistics, patchify, unpatchify

MASK_GREY = 0.5


class Completion(NamedTuple):
    """Pictures in [0, 1].

    Attributes:
        original: the images.
        masked: the original, with hidden patches grey.
        prediction: what the model predicts in hidden patches; visible ones, where it is not trained, are grey.
        completed: the prediction in hidden patches, the original elsewhere.
    """

    original: Float[Tensor, "b c hh ww"]
    masked: Float[Tensor, "b c hh ww"]
    prediction: Float[Tensor, "b c hh ww"]
    completed: Float[Tensor, "b c hh ww"]


@torch.no_grad()
def complete(
    model: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    mask: Bool[Tensor, "b n"],
) -> Completion:
    """Hide patches of normalised images and let the model complete them; see `predicted_patches`."""
    return completion_of(model.config, images, mask, predicted_patches(model, images, mask))


def predicted_patches(
    model: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    mask: Bool[Tensor, "b n"],
) -> Float[Tensor, "b n q"]:
    """The prediction for every patch, in the units of normalised images.

    Predictions of a model with `norm_pix_loss` are in units of each patch's own mean and standard deviation. These are
    taken from the original, hidden patches included: these pictures therefore use each patch's true brightness and
    contrast, and look better than the model's own output.
    """
    own = images.to(model.mask_token)  # a model from Python may be elsewhere, and in another precision
    prediction = model(own, mask=mask).prediction.to(images)
    if not model.config.norm_pix_loss:
        return prediction
    mean, std = patch_statistics(patchify(images, model.config.patch_size))
    return prediction * std + mean


def flat_patches(
    model: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, "b n q"]:
    """The completion that needs no network: in every hidden patch the mean colour of the visible ones.

    Where none is visible it is that of the training images, 0 in the units of normalised images. For a model with
    `norm_pix_loss` it is each patch's own mean, which such models get from the original, too.
    """
    patches = patchify(images, model.config.patch_size)
    if model.config.norm_pix_loss:
        return patch_statistics(patches)[0].expand_as(patches)
    pixels = patches.unflatten(2, (-1, images.shape[1]))
    visible = ~mask[..., None, None].to(images.device)
    count = visible.expand_as(pixels).sum((1, 2), keepdim=True).clamp(min=1)
    mean = (pixels * visible).sum((1, 2), keepdim=True) / count
    return mean.expand_as(pixels).flatten(2)


def completion_of(
    config: ModelConfig,
    images: Float[Tensor, "b c hh ww"],
    mask: Bool[Tensor, "b n"],
    prediction: Float[Tensor, "b n q"],
) -> Completion:
    """Pictures of normalised images and of a prediction in the same units."""
    target = patchify(images, config.patch_size)

    def picture(patches: Tensor) -> Tensor:
        pixels = unpatchify(patches, config.patch_size, config.grid_size)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
        return (pixels * std + mean).clamp(0.0, 1.0)

    original, predicted = picture(target), picture(prediction)
    of_patches = mask.to(images.device)[..., None].expand_as(target).to(target.dtype)
    hidden = unpatchify(of_patches, config.patch_size, config.grid_size) > 0
    return Completion(
        original=original,
        masked=torch.where(hidden, MASK_GREY, original),
        prediction=torch.where(hidden, predicted, MASK_GREY),
        completed=torch.where(hidden, predicted, original),
    )
