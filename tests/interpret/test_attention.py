"""Maps, masks and scores by hand, on grids that are not square."""

import pytest
import torch
from torchvision.ops import box_iou

from crate_mae.interpret.attention import attention_on_grid
from crate_mae.interpret.foregrounds import (
    CORRECT_IOU,
    intersection_over_union,
    largest_boxes,
    mass_mask,
    principal_mask,
)

PICTURE = torch.tensor(
    [
        [1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
    ],
    dtype=torch.bool,
)


def test_attention_is_laid_out_on_the_grid_behind_prefix_tokens():
    attention = torch.arange(2 * 3 * 7 * 7, dtype=torch.float32).view(2, 3, 7, 7)
    maps = attention_on_grid(attention, (2, 3))
    assert maps.shape == (2, 3, 2, 3)
    assert maps[1, 2].tolist() == attention[1, 2, 0, 1:].view(2, 3).tolist()
    assert attention_on_grid(attention, (2, 3), query=4)[0, 1, 1, 0] == attention[0, 1, 4, 4]


@pytest.mark.parametrize(("mass", "kept"), [(0.3, 1), (0.4, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_masks_hold_their_mass_in_the_fewest_patches(mass, kept):
    saliency = torch.tensor([[[0.1, 0.4, 0.0], [0.2, 0.3, 0.0]]], dtype=torch.float64)
    mask = mass_mask(saliency, mass)
    assert mask.sum() == kept
    assert mask[0, 0, 1]
    assert not mask_of_zero(mass)


def mask_of_zero(mass):
    return mass_mask(torch.zeros(1, 2, 3), mass).any()


def test_the_first_component_tells_an_object_from_its_surroundings():
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(2, 4, 5, dtype=torch.bool)
    inside[0, 1:3, 1:4] = True
    inside[1, 1:3, 2:4] = True
    noise = 0.1 * torch.randn(2, 20, 7, generator=generator)
    tokens = torch.where(inside.flatten(1)[..., None], torch.linspace(-1, 1, 7), torch.linspace(2, 0, 7)) + noise
    assert torch.equal(principal_mask(tokens, (4, 5)), inside)
    assert torch.equal(principal_mask(-tokens, (4, 5)), inside)


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_equal_tokens_have_no_foreground(fill):
    assert not principal_mask(torch.full((1, 20, 7), fill), (4, 5)).any()


def test_overlaps_by_hand():
    truth = torch.zeros(2, 3, 5, dtype=torch.bool)
    truth[0, 1:, 3] = True
    masks = torch.stack([PICTURE, torch.zeros_like(PICTURE)])
    assert intersection_over_union(masks, truth).tolist() == [0.5, 1.0]


def test_boxes_are_of_the_largest_connected_part():
    masks = torch.stack([PICTURE, torch.zeros_like(PICTURE), torch.ones_like(PICTURE)])
    boxes = largest_boxes(masks)
    assert boxes.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 3, 5]]
    truth = torch.tensor([[1, 2, 3, 5], [0, 0, 1, 1], [0, 0, 1, 3]])
    assert box_iou(boxes, truth).diagonal().tolist() == pytest.approx([4 / 6, 0, 3 / 15])
    # A half is not more than a half.
    assert box_iou(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])) <= CORRECT_IOU
