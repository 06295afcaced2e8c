"""What a model begins with: its initialisation, official or near an isometry, and its fixed table of positions.

Officially all linear maps, MSSA's output projection among them, are initialised with Xavier-uniform weights. MSSA is
derived as a small gradient step, and this is a large one: sparse codes are non-negative, so all tokens share a large
common part, attention averages it, the output projection adds as much again, and ISTA hands on nothing but the
normalised sum. After the 6 + 6 layers of `crate_mae_micro_patch4_32`, 0.2% of the energy of CIFAR-10's tokens
distinguishes the places of an image; the first several hundred steps of training go into undoing that (`docs/log.md`).

The "isometric" initialisation takes a tenth of the output projection, so that Z + MSSA(Z) is near Z, and orthogonal
dictionaries E in the decoder, so that Y E^T keeps all angles. The encoder's dictionary stays as it is: I + eta (D -
D^T D) is near the identity already. 29% of the energy is then left for places. The functions that can be learned are
the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.config import Initialization
from crate_mae.models.layers import MSSA, Dictionary

ISOMETRIC_GAIN = 0.1  # of MSSA's output projection, relative to Xavier's


def initialize(module: nn.Module, init: Initialization = "official") -> None:
    """Initialise the linear maps and dictionaries of an encoder or decoder in place.

    The patch embedding counts as a linear map of flattened patches. Biases are initialised to zero. Layer norms, and
    dictionaries if `init` is "official", initialise themselves.

    Args:
        module: any module with the layers of `models.layers` or of timm.
        init: "official", the Xavier-uniform weights of the official `initialize_weights`; or "isometric", in which
            MSSA's free output projection is `ISOMETRIC_GAIN` times that, and the decoder's dictionaries are orthogonal.
            Layers of timm have neither.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if init == "isometric":
        _make_isometric(module)


@torch.no_grad()
def _make_isometric(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, MSSA) and part.proj is not None:
            part.proj.weight.mul_(ISOMETRIC_GAIN)
        elif isinstance(part, Dictionary):
            nn.init.orthogonal_(part.weight)


def sincos_positions(embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 1) -> Float[Tensor, "n d"]:
    """Positions of the prefix tokens (zeros), then of the patches row by row.

    With frequencies w_i = 10000^(-4 i / d), i = 0 .. d/4 - 1, the patch in row y and column x has the position
    [sin(x w), cos(x w), sin(y w), cos(y w)], each of the four d/4 long. Columns come first, as in the official
    `pos_embed.py`.

    Args:
        embed_dim: width d, a multiple of 4.
        grid_size: rows and columns of patches.
        num_prefix_tokens: tokens before the patches (the class token).

    Raises:
        UserError: if 4 does not divide the width.
    """
    if embed_dim % 4:
        raise UserError(f"The width is {embed_dim}, but two-dimensional sine-cosine positions need a multiple of 4.")
    gh, gw = grid_size
    frequencies = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    rows = torch.outer(torch.arange(gh, dtype=torch.float64), frequencies)
    columns = torch.outer(torch.arange(gw, dtype=torch.float64), frequencies)
    x = torch.cat([columns.sin(), columns.cos()], dim=1).expand(gh, gw, -1)
    y = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(gh, gw, -1)
    patches = torch.cat([x, y], dim=2).flatten(0, 1)
    return torch.cat([patches.new_zeros(num_prefix_tokens, embed_dim), patches]).float()
