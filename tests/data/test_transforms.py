import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import evaluation_transform, pretrain_transform
from crate_mae.errors import UserError

HALF = ((0.5,), (0.25,))


def ramp(width, height):
    """Grey levels that grow from left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1)))


def test_normalisation_is_mean_and_std_of_the_unit_range():
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    result = evaluation_transform((2, 3), 3, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25))(image)
    assert result[:, 1, 2].tolist() == pytest.approx([0, 0, 2], abs=1e-6)
    assert result.dtype == torch.float32


def test_an_image_of_the_right_size_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8)
    result = evaluation_transform((7, 5), 1, (0.0,), (1.0,))(Image.fromarray(pixels))
    assert torch.equal((result[0] * 255).round().byte(), torch.from_numpy(pixels))


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (101, 11), (4, 3)])
@pytest.mark.parametrize("target", [(16, 16), (12, 20)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_evaluation_covers_the_target_from_any_size(size, target, as_tensor):
    image = ramp(*size)
    if as_tensor:
        image = torch.from_numpy(np.array(image))[None]
    result = evaluation_transform(target, 1, (0.0,), (1.0,))(image)
    assert result.shape == (1, *target)
    assert result.mean() == pytest.approx(0.5, abs=0.05)


def test_evaluation_keeps_the_aspect_and_the_centre():
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # the centre square is white
    result = evaluation_transform((10, 10), 1, (0.0,), (1.0,))(image)
    assert result[:, :, 1:-1].min() > 0.99


def test_pretraining_without_crop_freedom_keeps_a_square_image():
    pixels = np.full((8, 8), 102, dtype=np.uint8)
    result = pretrain_transform((8, 8), 1, *HALF, min_crop=1.0)(Image.fromarray(pixels))
    assert result.flatten().tolist() == pytest.approx([-0.4] * 64, abs=1e-5)


@pytest.mark.parametrize("flip", [True, False])
def test_flips_happen_only_when_asked(flip):
    transform = pretrain_transform((8, 8), 1, *HALF, min_crop=0.9, flip=flip)
    torch.manual_seed(0)
    falling = [bool(result[0, 4, 0] > result[0, 4, -1]) for result in (transform(ramp(8, 8)) for _ in range(40))]
    assert any(falling) == flip
    assert not all(falling)


def test_crops_of_wide_targets_are_wide():
    transform = pretrain_transform((8, 32), 1, (0.0,), (1.0,), min_crop=1.0, flip=False)
    result = transform(ramp(64, 16))  # of the target's own aspect 4: a crop is nearly the whole image
    assert result[0, 4, -1] - result[0, 4, 0] > 0.7


def test_sixteen_bit_images_are_augmented_with_full_precision():
    pixels = np.full((9, 9), 30001, dtype=np.uint16)
    result = pretrain_transform((6, 6), 3, (0.0,) * 3, (1.0,) * 3)(Image.fromarray(pixels))
    assert result.shape == (3, 6, 6)
    assert result.mean().item() == pytest.approx(30001 / 65535, abs=1e-6)


def test_a_tensor_of_the_data_set_is_not_changed():
    image = torch.full((1, 4, 4), 0.5)
    evaluation_transform((4, 4), 1, *HALF)(image)
    assert torch.equal(image, torch.full((1, 4, 4), 0.5))


def test_transforms_can_be_sent_to_workers():
    for transform in (evaluation_transform((4, 4), 1, *HALF), pretrain_transform((4, 4), 1, *HALF)):
        assert pickle.loads(pickle.dumps(transform))(ramp(5, 5)).shape == (1, 4, 4)


def test_wrong_settings_are_errors():
    with pytest.raises(UserError, match=r"3 channel\(s\) need as many means"):
        evaluation_transform((4, 4), 3, *HALF)
    with pytest.raises(UserError, match="std must be positive"):
        evaluation_transform((4, 4), 1, (0.5,), (0.0,))
    with pytest.raises(UserError, match=r"in \(0, 1\]"):
        pretrain_transform((4, 4), 1, *HALF, min_crop=0.0)
