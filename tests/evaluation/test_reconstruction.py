"""Completions of many images at many mask ratios."""

from itertools import pairwise

import pytest
import torch

import crate_mae
from crate_mae.data import evaluation_transform, open_source
from crate_mae.errors import UserError
from crate_mae.evaluation.reconstruction import complete_in_batches, completion_scores, nested_masks, read_images
from crate_mae.models.completion import complete

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return crate_mae.create_model("crate_mae_nano_patch2_8", drop_path=0.5, **SMALL).train()


@pytest.fixture
def images():
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_masks_grow_with_the_ratio_and_repeat():
    masks = [nested_masks(11, 16, ratio, seed=4) for ratio in (0.3, 0.5, 0.75, 0.9)]
    assert [mask.sum(dim=1).unique().tolist() for mask in masks] == [[5], [8], [12], [15]]
    for smaller, larger in pairwise(masks):
        assert (larger | ~smaller).all()
    assert torch.equal(nested_masks(5, 16, 0.5, seed=4), masks[1][:5])
    assert not torch.equal(nested_masks(11, 16, 0.5, seed=5), masks[1])


def test_batches_give_what_one_pass_gives(model, images):
    masks = nested_masks(7, 16, 0.5, seed=0)
    parts = complete_in_batches(model, images, masks, batch_size=3)
    assert model.training
    whole = complete(model.eval(), images, masks)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_scores_of_a_known_prediction(model, images):
    """Predictions that are 0.1 too large everywhere have a squared error of 0.01, and 0.01 / std^2 in each patch."""
    from crate_mae.models.masking import patchify

    def too_large(model, images, mask):
        return patchify(images, 2) + 0.1

    (score,) = completion_scores(model, images, [0.5], seed=2, batch_size=4, predict=too_large)
    assert (score.mask_ratio, score.hidden) == (0.5, 8)
    assert score.mse == pytest.approx(0.01, rel=1e-4)
    hidden = patchify(images, 2)[nested_masks(7, 16, 0.5, seed=2)]
    assert score.normalised_mse == pytest.approx(float((0.01 / (hidden.var(dim=1) + 1e-6)).mean()), rel=1e-4)


def test_images_are_read_until_there_are_enough():
    class Half(list):
        def __getitem__(self, i):
            if i % 2:
                raise OSError(f"no image {i}")
            return super().__getitem__(i)

    source = open_source(Half(torch.full((3, 4, 4), i / 10) for i in range(10)))
    transform = evaluation_transform((4, 4), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    read = read_images(source, transform, [3, 2, 6, 5, 8, 4], 3)
    assert [round(float(image.mean()), 1) for image in read.images] == [0.2, 0.6, 0.8]
    assert read.locations == ["Half[2]", "Half[6]", "Half[8]"]
    assert [bad.location for bad in read.bad] == ["Half[3]", "Half[5]"]
    with pytest.raises(UserError, match="No image of Half can be read"):
        read_images(source, transform, [1, 3], 3)
