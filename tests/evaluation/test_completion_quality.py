import math

import pytest
import torch

from crate_mae.evaluation.reconstruction import completion_quality
from crate_mae.models.completion import Completion
from crate_mae.models.masking import unpatchify


def completion_with_error(error, mask, size, patch):
    """Grey pictures whose hidden patches are `error` too bright."""
    grid = (size // patch, size // patch)
    original = torch.full((len(mask), 3, size, size), 0.5)
    hidden = unpatchify(mask[..., None].expand(-1, -1, patch * patch * 3).float(), patch, grid)
    return Completion(original, original, original + error, original + error * hidden)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (24, 4)])
def test_psnr_is_that_of_hidden_pixels_alone(size, patch):
    mask = torch.zeros(3, (size // patch) ** 2, dtype=torch.bool)
    mask[:, :5] = True
    quality = completion_quality(completion_with_error(0.1, mask, size, patch), mask, patch)
    torch.testing.assert_close(quality.psnr, torch.full((3,), -20 * math.log10(0.1)))
    assert quality.ssim.shape == (3,)
    assert (quality.ssim < 1).all()


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (24, 4)])
def test_a_perfect_picture_has_ssim_one(size, patch):
    mask = torch.zeros(2, (size // patch) ** 2, dtype=torch.bool)
    mask[:, 0] = True
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    quality = completion_quality(Completion(images, images, images, images), mask, patch)
    torch.testing.assert_close(quality.ssim, torch.ones(2))


def test_each_image_is_measured_by_itself():
    mask = torch.ones(2, 16, dtype=torch.bool)
    pair = [completion_with_error(error, mask[:1], 8, 2) for error in (0.1, 0.01)]
    both = Completion(*(torch.cat(pictures) for pictures in zip(*pair, strict=True)))
    torch.testing.assert_close(completion_quality(both, mask, 2).psnr, torch.tensor([20.0, 40.0]))
