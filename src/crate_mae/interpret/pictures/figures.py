"""The figures: arrays in, figure out; nothing is computed that needs a model."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from crate_mae.interpret.attention_maps import FOREGROUND_MASS, mass_mask
from crate_mae.interpret.pictures.tiles import Tile, cut_out, draw_tiles, heat

_TILE = 1.25  # inches
_LEAST_WIDTH = 4  # tiles, which headings need
_MOST_IN_A_LINE = 8


def draw_attention(
    pictures: Float[np.ndarray, "b hh ww 3"],
    heads: Float[np.ndarray, "b h gh gw"],
    saliency: Float[np.ndarray, "b gh gw"],
) -> Figure:
    """What the class token looks at in each image, see `attention_tiles`.

    Args:
        pictures: the images, in [0, 1].
        heads: attention to each place, of each head.
        saliency: of all heads together.
    """
    heading = (
        "Attention of the class token, each map from 0 (dark) to its largest value;\n"
        "below: that value over the map's mean (1 is even attention)"
    )
    return draw_tiles(attention_tiles(pictures, heads, saliency), tile_width=_TILE, heading=heading)


def attention_tiles(
    pictures: Float[np.ndarray, "b hh ww 3"],
    heads: Float[np.ndarray, "b h gh gw"],
    saliency: Float[np.ndarray, "b gh gw"],
) -> list[list[Tile | None]]:
    """A row for each image, or several for many heads: the image, all heads together, their foreground, each head.

    A map's colours go from 0 to its own largest value, so that even attention is bright all over. The foreground is
    where the largest values make up 60% of all heads' attention.
    """
    foreground = mass_mask(torch.from_numpy(saliency), FOREGROUND_MASS).numpy()
    rows: list[list[Tile | None]] = []
    for number, picture in enumerate(pictures):
        titles = ["image", "all heads", f"{FOREGROUND_MASS:.0%} of that", *(f"head {i}" for i in range(heads.shape[1]))]
        names = iter(titles if number == 0 else [""] * len(titles))
        first = [
            Tile(picture, next(names)),
            heat(saliency[number], next(names)),
            cut_out(picture, foreground[number], next(names)),
        ]
        lines = _lines([heat(shares, next(names)) for shares in heads[number]])
        rows += [[*(first if line == 0 else [None] * len(first)), *maps] for line, maps in enumerate(lines)]
    return rows


def draw_token_colours(
    pictures: Float[np.ndarray, "b hh ww 3"],
    colours: Float[np.ndarray, "b gh gw 3"],
    explained: Float[np.ndarray, "k 3"],
) -> Figure:
    """Images, and under each its tokens as colours.

    Args:
        pictures: the images, in [0, 1].
        colours: three principal components of the tokens as red, green and blue, see `interpret.tokens`.
        explained: share of the variance that each shows: of all images (k = 1), or of each (k = b).
    """
    joint = len(explained) == 1 < len(pictures)
    captions = [""] * len(pictures) if joint else [f"{shares.sum():.0%}" for shares in explained]
    images = _lines([Tile(picture) for picture in pictures])
    tokens = _lines([Tile(each, caption=caption) for each, caption in zip(colours, captions, strict=True)])
    rows = [[*line, *[None] * (_LEAST_WIDTH - len(line))] for pair in zip(images, tokens, strict=True) for line in pair]
    text = (
        f"of all images' tokens together:\n{explained[0].sum():.0%} of their variance"
        if joint
        else "of each image's tokens;\nbelow: their share of the variance"
    )
    return draw_tiles(rows, tile_width=_TILE, heading=f"Three principal components {text}")


def _lines(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """As few lines as are not too long, of about one length."""
    per_line = math.ceil(len(tiles) / math.ceil(len(tiles) / _MOST_IN_A_LINE))
    return [list(tiles[i : i + per_line]) for i in range(0, len(tiles), per_line)]
