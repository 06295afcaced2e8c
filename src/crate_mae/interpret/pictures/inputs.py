"""What figures are made of besides measures: images as the model takes them, its tokens and the grid they lie on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.features import encode, evaluating, layer_number

_AT_ONCE = 16  # images


def shown_images(
    images: Float[Tensor, "b c hh ww"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "b hh ww 3"]:
    """Normalised images as pictures in [0, 1]; of one channel, or of any but three, the mean is shown in grey."""
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


def token_grid(encoder: nn.Module, image_size: tuple[int, int], tokens: int, layer: int = -1) -> tuple[int, int]:
    """Rows and columns of the patches, or of the feature map, that the tokens of a layer lie on.

    Raises:
        UserError: if these tokens lie on no grid.
    """
    grids: list[Any] = [getattr(getattr(encoder, "patch_embed", None), "grid_size", None)]
    info: Any = getattr(encoder, "feature_info", None)
    if info is not None:
        reduction = info[layer_number(encoder, layer)]["reduction"]
        grids.append((-(-image_size[0] // reduction), -(-image_size[1] // reduction)))
    for grid in grids:
        if grid is not None and grid[0] * grid[1] == tokens:
            return int(grid[0]), int(grid[1])
    raise UserError(f"The tokens of this {type(encoder).__name__} do not lie on a grid, so they make no picture.")
