"""Fixed two-dimensional sine-cosine positions."""

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError


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
