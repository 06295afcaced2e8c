"""Attention as maps: what a token attends to, on the grid of patches or on a finer one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.features import evaluating, has_class_token, layer_number
from crate_mae.models.tracing import layers_of, taps_of, trace

_AT_ONCE = 16  # images


def attention_on_grid(
    attention: Float[Tensor, "b h n m"], grid_size: tuple[int, int], query: int = 0
) -> Float[Tensor, "b h gh gw"]:
    """How much of its attention a token gives to each patch, head by head; by default the class token.

    Args:
        attention: weights of an unmasked pass, as `models.tracing.trace` gives them.
        grid_size: rows and columns of patches, which are the last tokens.
        query: number of the token whose attention it is.
    """
    gh, gw = grid_size
    return attention[:, :, query, -gh * gw :].unflatten(-1, (gh, gw))


class ClassAttention(NamedTuple):
    """What the class token attends to.

    Attributes:
        heads: share of its attention that each head gives to each place; the rest goes to prefix tokens.
        saliency: the mean over heads, as shares that sum to 1.
    """

    heads: Float[Tensor, "b h gh gw"]
    saliency: Float[Tensor, "b gh gw"]


def class_attention(
    encoder: nn.Module, images: Float[Tensor, "b c hh ww"], *, layer: int = -1, stride: int | None = None
) -> ClassAttention:
    """Attention of the class token to the patches of whole images, in one layer.

    Args:
        encoder: ours, or a Vision Transformer of timm.
        images: normalised, of the encoder's size.
        layer: from 0, or negative from the end.
        stride: pixels from one place to the next, see `overlapping`; by default the patch size.

    Raises:
        UserError: if the encoder has no class token or no attention, there is no such layer or stride, or the weights
            are not finite.
    """
    name = _attention_name(encoder, layer)
    if not has_class_token(encoder):
        raise UserError(
            f"This {type(encoder).__name__} has no class token whose attention could be drawn. `viz pca` needs none."
        )
    grid: Any = encoder.get_submodule("patch_embed").grid_size
    parts = [
        overlapping(batch, grid, stride, lambda part: attention_on_grid(_attention(encoder, part, name), grid))
        for batch in images.split(_AT_ONCE)
    ]
    heads = torch.cat(parts)
    mean = heads.mean(1)
    total = mean.sum((1, 2), keepdim=True)
    return ClassAttention(heads, mean / torch.where(total == 0, 1, total))


def patch_affinities(
    encoder: nn.Module, images: Float[Tensor, "b c hh ww"], *, layer: int = -1
) -> Iterator[Float[Tensor, "b h n n"]]:
    """How much each head's attention mixes any two patches, few images at a time: (P + P^T) / 2 without prefix tokens.

    Raises:
        UserError: if the encoder has no attention, there is no such layer, or the weights are not finite.
    """
    name = _attention_name(encoder, layer)
    rows, columns = encoder.get_submodule("patch_embed").grid_size  # pyright: ignore[reportGeneralTypeIssues]
    for batch in images.split(_AT_ONCE):
        attention = _attention(encoder, batch, name)[..., -rows * columns :, -rows * columns :]
        yield (attention + attention.mT) / 2


def _attention(encoder: nn.Module, images: Float[Tensor, "b c hh ww"], name: str) -> Float[Tensor, "b h n n"]:
    """The attention of a pass over whole images."""
    device = next(encoder.parameters()).device
    with evaluating(encoder), trace(encoder, [name]) as record:
        encoder.forward_features(images.to(device))  # pyright: ignore[reportCallIssue]  # timm's contract
    attention = record[name][0].float().cpu()
    if not attention.isfinite().all():
        raise UserError("This attention is not finite: the weights of the model hold NaN or overflow.")
    return attention


def overlapping(
    images: Float[Tensor, "b c hh ww"],
    grid_size: tuple[int, int],
    stride: int | None,
    maps_of: Callable[[Tensor], Tensor],
) -> Float[Tensor, "b h fh fw"]:
    r"""Maps on a grid finer than that of the patches, from images that are shifted by less than a patch.

    A patch is as wide as p / s fine cells, s being the stride. Shifted by $m s - \lfloor (p - s) / 2 \rfloor$ pixels,
    m = 0, ..., p / s - 1, downwards and to the right, the patches lie centred on every (p / s)-th fine cell (to half a
    pixel where p - s is odd); all (p / s)^2 shifts together fill the fine grid. Every pass is one that the model could
    be shown: of its own size, with its own number of tokens. Pixels from outside are those of the image mirrored at its
    border, at most p / 2 pixels of it. Values are divided by (p / s)^2, so that shares stay shares.

    Args:
        images: normalised.
        grid_size: rows and columns of patches.
        stride: s in pixels, a divisor of p; None for p, which is a single pass.
        maps_of: from images to their maps on the grid of patches.

    Raises:
        UserError: for a stride that does not divide the patch.
    """
    height, width = images.shape[2:]
    patch = (height // grid_size[0], width // grid_size[1])
    if stride is None or patch == (stride, stride):
        return maps_of(images)
    _check_stride(stride, patch)
    above, left = ((side - stride) // 2 for side in patch)
    below, right = patch[0] - stride - above, patch[1] - stride - left
    padded = F.pad(images, (left, right, above, below), mode="reflect")
    rows, columns = (side // stride for side in patch)
    fine = images.new_empty(0)
    for row in range(rows):
        for column in range(columns):
            top, start = row * stride, column * stride
            maps = maps_of(padded[..., top : top + height, start : start + width])
            if not fine.numel():
                fine = maps.new_empty(*maps.shape[:2], grid_size[0] * rows, grid_size[1] * columns)
            fine[..., row::rows, column::columns] = maps / (rows * columns)
    return fine


def _check_stride(stride: int, patch: tuple[int, int]) -> None:
    divisors = [s for s in range(1, min(patch) + 1) if not any(side % s for side in patch)]
    if stride not in divisors:
        raise UserError(
            f"A stride of {stride} does not divide a patch of {patch[0]} x {patch[1]} pixels: take one of "
            f"{', '.join(map(str, divisors))}."
        )


def _attention_name(encoder: nn.Module, layer: int) -> str:
    """What `trace` calls the attention of a layer."""
    layers = layers_of(encoder)
    kind = type(encoder).__name__
    if not any("attention" in taps_of(each) for each in layers.values()):
        raise UserError(
            f"No layer of this {kind} has attention between all patches: attention maps are available only for "
            "Vision Transformers of this library and of timm."
        )
    return f"{list(layers)[layer_number(encoder, layer)]}.attention"
