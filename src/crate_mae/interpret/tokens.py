"""Images as pictures, their tokens as colours by principal components, and the nearest neighbours of tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.features import encode, evaluating, layer_number

_AT_ONCE = 16  # images
_COLOURS = 3


def to_pictures(
    images: Float[Tensor, "b c hh ww"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "b hh ww 3"]:
    """Normalised images as pictures in [0, 1]; of one channel, or of any but three, their mean in grey."""
    offset, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    pixels = (images * scale + offset).clamp(0, 1)
    if images.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).float().cpu().numpy()


def encode_patches(encoder: nn.Module, images: Float[Tensor, "b c hh ww"], layer: int = -1) -> Float[Tensor, "b n d"]:
    """Patch tokens of a layer, see `models.features.encode`, for any number of images."""
    device = next((parameter.device for parameter in encoder.parameters()), images.device)
    with evaluating(encoder):
        return torch.cat([encode(encoder, part.to(device), layer, "tokens").cpu() for part in images.split(_AT_ONCE)])


def grid_size(encoder: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of an encoder's patches; None if they lie on no grid."""
    size: Any = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def token_grid(encoder: nn.Module, image_size: tuple[int, int], tokens: int, layer: int = -1) -> tuple[int, int]:
    """Rows and columns of the patches, or of the feature map, that the tokens of a layer lie on.

    Raises:
        UserError: if these tokens lie on no grid.
    """
    grids = [grid_size(encoder)]
    info: Any = getattr(encoder, "feature_info", None)
    if info is not None:
        reduction = info[layer_number(encoder, layer)]["reduction"]
        grids.append((-(-image_size[0] // reduction), -(-image_size[1] // reduction)))
    for grid in grids:
        if grid is not None and grid[0] * grid[1] == tokens:
            return grid
    raise UserError(f"The tokens of this {type(encoder).__name__} do not lie on a grid, so they make no picture.")


class TokenColours(NamedTuple):
    """Tokens as colours.

    Attributes:
        pictures: in [0, 1], one colour a patch.
        explained: share of the tokens' variance that each colour channel shows; one row if colours are joint, else one
            an image.
    """

    pictures: Float[np.ndarray, "b gh gw 3"]
    explained: Float[np.ndarray, "k 3"]


def token_colours(patches: Float[Tensor, "b n d"], grid_size: tuple[int, int], *, joint: bool = True) -> TokenColours:
    """Three principal components of patch tokens as red, green and blue, scaled to [0, 1].

    Args:
        patches: tokens without class token.
        grid_size: rows and columns of patches.
        joint: one set of components over all images, so that the same colour means the same thing in each; else each
            image has its own. Equal tokens are grey.

    Raises:
        UserError: for tokens that are not finite.
    """
    tokens = patches.detach().double().cpu().numpy()
    if not np.isfinite(tokens).all():
        raise UserError("These tokens are not finite numbers: the weights of the model hold NaN or overflow.")
    groups = [tokens] if joint else list(tokens[:, None])
    found = [_colours(group.reshape(-1, group.shape[-1])) for group in groups]
    pictures = np.concatenate([colours for colours, _ in found]).reshape(len(tokens), *grid_size, _COLOURS)
    return TokenColours(pictures, np.stack([explained for _, explained in found]))


def nearest_tokens(
    patches: Float[Tensor, "b n d"], image: int, token: int, count: int = 5
) -> list[tuple[int, int, float]]:
    """The tokens of other images with the largest cosine similarity to one token, at most one of each image.

    Each is (number of the image, number of the token in it, cosine), best first.

    Args:
        patches: tokens of several images, without class token.
        image: number of the image that the token is of.
        token: its number in it.
        count: how many neighbours; of fewer other images, each gives one.

    Raises:
        UserError: if there is no such token, or no other image.
    """
    b, n, _ = patches.shape
    if not (0 <= image < b and 0 <= token < n):
        raise UserError(f"There is no token {token} of image {image}: there are {b} images of {n} tokens.")
    if b < 2:
        raise UserError("Neighbours are looked up in other images, but there is only one image.")
    unit = F.normalize(patches.float(), dim=-1)
    best = (unit @ unit[image, token]).max(dim=1)
    order = best.values.argsort(descending=True, stable=True)
    order = order[order != image][:count]
    return list(zip(order.tolist(), best.indices[order].tolist(), best.values[order].tolist(), strict=True))


def _colours(tokens: Float[np.ndarray, "k d"]) -> tuple[np.ndarray, np.ndarray]:
    """Colours of tokens, and the share of variance behind each."""
    count = min(_COLOURS, *tokens.shape)
    colours, explained = np.full((len(tokens), _COLOURS), 0.5), np.zeros(_COLOURS)
    spread = np.abs(tokens - tokens.mean(0)).max()
    if spread <= 1e-9 * np.abs(tokens).max():
        return colours, explained
    pca = PCA(count, svd_solver="full").fit(tokens)
    scores = pca.transform(tokens)
    low, high = scores.min(0), scores.max(0)
    shown = high - low > 1e-9 * spread
    colours[:, :count][:, shown] = ((scores - low) / np.where(shown, high - low, 1))[:, shown]
    explained[:count] = pca.explained_variance_ratio_
    return colours, explained
