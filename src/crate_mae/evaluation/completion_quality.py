"""How good completed pictures are, in the units of image processing."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from crate_mae.models.completion import Completion
from crate_mae.models.masking import patchify


class CompletionQuality(NamedTuple):
    """One number per image.

    Attributes:
        psnr: peak signal-to-noise ratio of the hidden patches alone, in decibels: -10 log10 of the mean squared error
            of pixels in [0, 1]. Visible patches, which the pasted picture has for free, do not count.
        ssim: structural similarity of the pasted picture to the original, at most 1. It looks at neighbourhoods, so
            visible patches do count.
    """

    psnr: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]


def completion_quality(completion: Completion, mask: Bool[Tensor, "b n"], patch_size: int) -> CompletionQuality:
    """Compare completed pictures with their originals.

    SSIM takes the usual Gaussian window of 11 pixels (sigma 1.5), and one of 5 pixels (sigma 0.5) on images of less
    than 16 pixels, into which the usual one does not fit.

    Args:
        completion: pictures in [0, 1].
        mask: true = hidden; at least one patch in every image.
        patch_size: side of a patch in pixels.
    """
    answers, guesses = (patchify(x, patch_size) for x in (completion.original, completion.completed))
    sigma = 1.5 if min(completion.original.shape[-2:]) >= 16 else 0.5
    psnr = [
        peak_signal_noise_ratio(guess[hidden], answer[hidden], data_range=1.0)
        for guess, answer, hidden in zip(guesses, answers, mask, strict=True)
    ]
    ssim = structural_similarity_index_measure(
        completion.pasted, completion.original, sigma=sigma, data_range=1.0, reduction="none"
    )
    assert isinstance(ssim, Tensor)
    return CompletionQuality(torch.stack(psnr), ssim.reshape(len(psnr)))
