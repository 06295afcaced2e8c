"""What heads look at: attention on the grid of patches, and the foreground that it tells."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from crate_mae.evaluation.probes import Score, wilson_interval

CORRECT_IOU = 0.5
FOREGROUND_MASS = 0.6  # DINO's share of the attention that makes the foreground


def attention_on_grid(
    attention: Float[Tensor, "b h n m"], grid_size: tuple[int, int], query: int = 0
) -> Float[Tensor, "b h gh gw"]:
    """How much of its attention a token gives to each patch, head by head; by default the class token.

    Args:
        attention: weights of an unmasked pass, as `models.tracing.trace` gives them.
        grid_size: rows and columns of patches, which are the last tokens.
        query: number of the token that looks.
    """
    gh, gw = grid_size
    return attention[:, :, query, -gh * gw :].unflatten(-1, (gh, gw))


def class_token_saliency(attention: Float[Tensor, "b h n m"], grid_size: tuple[int, int]) -> Float[Tensor, "b gh gw"]:
    """The class token's attention to patches, mean over heads, as shares that sum to 1."""
    saliency = attention_on_grid(attention, grid_size).float().mean(1)
    total = saliency.sum((1, 2), keepdim=True)
    return saliency / torch.where(total == 0, 1, total)


def mass_mask(saliency: Float[Tensor, "b gh gw"], mass: float = FOREGROUND_MASS) -> Bool[Tensor, "b gh gw"]:
    """The fewest patches that hold a share `mass` of the saliency: foreground as in DINO (Caron et al. 2021)."""
    values, order = saliency.flatten(1).sort(dim=1, descending=True, stable=True)
    before = values.cumsum(1) - values
    kept = before < mass * values.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, order, kept).unflatten(1, saliency.shape[1:])


def principal_mask(patches: Float[Tensor, "b n d"], grid_size: tuple[int, int]) -> Bool[Tensor, "b gh gw"]:
    """Foreground by the sign of each image's first principal component of its tokens.

    The sign of a component is arbitrary: foreground is the side that has less of the border of the image. Equal tokens
    have no foreground.
    """
    centred = patches.double() - patches.double().mean(1, keepdim=True)
    scores = torch.linalg.svd(centred, full_matrices=False)
    first = (scores.U[..., 0] * scores.S[..., :1]).unflatten(1, grid_size)
    positive, negative = first > 0, first < 0
    border = torch.ones(grid_size, dtype=torch.bool, device=patches.device)
    border[1:-1, 1:-1] = False
    # Shares, not numbers: else the larger side would lose.
    outside = [(side & border).sum((1, 2)) / side.sum((1, 2)).clamp_min(1) for side in (positive, negative)]
    chosen = torch.where((outside[0] <= outside[1])[:, None, None], positive, negative)
    size = patches.double().square().sum((1, 2))
    return chosen & (scores.S[:, 0].square() > 1e-12 * size)[:, None, None]


def intersection_over_union(mask: Bool[Tensor, "b hh ww"], truth: Bool[Tensor, "b hh ww"]) -> Float[Tensor, "b"]:
    """|A and B| / |A or B| of each image; 1 where both are empty."""
    union = (mask | truth).sum((1, 2))
    return torch.where(union > 0, (mask & truth).sum((1, 2)) / union.clamp_min(1), 1.0)


def to_pixels(mask: Bool[Tensor, "b gh gw"], patch_size: int) -> Bool[Tensor, "b hh ww"]:
    """A mask of patches as one of pixels."""
    return mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)


def largest_boxes(mask: Bool[Tensor, "b gh gw"]) -> Int[Tensor, "b 4"]:
    """The box (top, left, bottom, right; the last two beyond it) of each mask's largest connected part.

    Neighbours share a side. An empty mask has the empty box 0, 0, 0, 0.
    """
    boxes = []
    for image in mask.cpu().numpy():
        found: Any = ndimage.label(image)
        parts, count = found
        if not count:
            boxes.append([0, 0, 0, 0])
            continue
        largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
        rows, columns = np.nonzero(parts == largest)
        boxes.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    return torch.tensor(np.array(boxes, dtype=np.int64))


def box_overlap(boxes: Int[Tensor, "b 4"], truth: Int[Tensor, "b 4"]) -> Float[Tensor, "b"]:
    """Intersection over union of boxes; 0 where both are empty."""
    top_left = torch.maximum(boxes[:, :2], truth[:, :2])
    bottom_right = torch.minimum(boxes[:, 2:], truth[:, 2:])
    shared = (bottom_right - top_left).clamp_min(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (boxes, truth)]
    return shared / (areas[0] + areas[1] - shared).clamp_min(1)


def correct_localisation(boxes: Int[Tensor, "b 4"], truth: Int[Tensor, "b 4"]) -> Score:
    """CorLoc: the share of images whose box overlaps the true one by more than a half, with Wilson's 95% interval."""
    right = int((box_overlap(boxes, truth) > CORRECT_IOU).sum())
    return wilson_interval(right, len(boxes))
