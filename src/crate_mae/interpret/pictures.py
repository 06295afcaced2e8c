"""Figures of small pictures in rows: images, attention maps, foregrounds, tokens as colours, atoms."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crate_mae.drawing.style import GREY, HEAT, blank
from crate_mae.drawing.text import percent
from crate_mae.interpret.atoms import Atom, Gallery
from crate_mae.interpret.foregrounds import FOREGROUND_MASS, mass_mask

_CAPTION, _GAP, _TITLE_LINE, _HEADING_LINE, _LABEL = 0.24, 0.08, 0.19, 0.21, 1.3  # inches
_LETTERS = 13  # of a heading in an inch
_VEIL = np.array([0.0, 0.45, 0.7])  # the colour that lies over what is not foreground
_VEILED = 0.8  # how much of it
_FRAME = "#D55E00"
_ROOMY, _NARROW = 1.3, 1.0  # inches of a tile below which titles become smaller


class Tile(NamedTuple):
    """One small picture.

    Attributes:
        pixels: hh ww 3 in [0, 1], or gh gw not negative, which is drawn as heat from 0 to its own largest value.
        title: above it.
        caption: below it.
        box: left, top, width and height of a frame on it, in pixels.
        label: at its left.
    """

    pixels: Float[np.ndarray, "hh ww 3"] | Float[np.ndarray, "gh gw"]
    title: str = ""
    caption: str = ""
    box: tuple[float, float, float, float] | None = None
    label: str = ""


Tiles = Sequence[Sequence[Tile | None]]  # rows, in which None keeps a place empty


def heat(values: Float[np.ndarray, "gh gw"], title: str = "") -> Tile:
    """A map of attention; the caption is its largest value divided by its mean, which is 1 for uniform attention."""
    largest, mean = float(values.max()), float(values.mean())
    return Tile(values, title, f"{largest / mean:.1f}" if mean else "none")


def cut_out(picture: Float[np.ndarray, "hh ww 3"], kept: Bool[np.ndarray, "gh gw"], title: str = "") -> Tile:
    """A picture under a blue veil, but for the patches that are kept."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(picture.shape, kept.shape, strict=False))
    veiled = _VEILED * _VEIL + (1 - _VEILED) * picture
    return Tile(np.where(kept[np.ix_(rows, columns)][..., None], picture, veiled).astype(picture.dtype), title)


def titled(columns: Sequence[str], rows: Sequence[Sequence[Tile]]) -> list[list[Tile]]:
    """Rows with a title over each tile of the first."""
    first, *rest = rows
    named = [tile._replace(title=title) for tile, title in zip(first, columns, strict=False)]
    return [[*named, *first[len(named) :]], *map(list, rest)]


def draw_tiles(rows: Tiles, *, tile_width: float, heading: str = "") -> Figure:
    """A figure of tiles, none of them higher than the first.

    Args:
        rows: need not be of one length.
        tile_width: in inches.
        heading: above all, in as many lines as it takes.
    """
    tiles = [tile for row in rows for tile in row if tile is not None]
    columns = max(len(row) for row in rows)
    side = tile_width - _GAP
    tallest = side * tiles[0].pixels.shape[0] / tiles[0].pixels.shape[1]
    titles = [max((1 + tile.title.count("\n") for tile in row if tile and tile.title), default=0) for row in rows]
    below = _CAPTION if any(tile.caption for tile in tiles) else _GAP
    font_size = 10.5 if tile_width > _ROOMY else 9.0 if tile_width > _NARROW else 8.0
    beside = _LABEL if any(tile.label for tile in tiles) else 0
    width = tile_width * columns + beside
    lines_above = textwrap.wrap(heading, int(_LETTERS * width))
    y = _GAP + _HEADING_LINE * len(lines_above)
    figure, axes = blank(width, y + _TITLE_LINE * sum(titles) + len(rows) * (tallest + below))
    if heading:
        figure.suptitle("\n".join(lines_above), y=1 - _GAP / figure.get_figheight(), va="top", fontsize=10, color=GREY)
    for row, lines in zip(rows, titles, strict=True):
        y += _TITLE_LINE * lines
        for column, tile in enumerate(row):
            if tile is not None:
                height = side * tile.pixels.shape[0] / tile.pixels.shape[1]
                left = beside + column * tile_width + _GAP / 2
                _draw_tile(axes, tile, (left, y + (tallest - height) / 2, side, height), font_size)
        y += tallest + below
    return figure


def _draw_tile(axes: Any, tile: Tile, place: tuple[float, float, float, float], font_size: float) -> None:
    """Draw a tile at its place: left, top, width and height in inches."""
    left, top, width, height = place
    extent = (left, left + width, top + height, top)
    colours = {"cmap": HEAT, "vmin": 0.0, "vmax": float(tile.pixels.max()) or 1.0} if tile.pixels.ndim == 2 else {}
    axes.imshow(tile.pixels, interpolation="nearest", aspect="auto", extent=extent, **colours)
    middle, bottom = left + width / 2, top + height
    if tile.title:
        axes.text(middle, top - 0.04, tile.title, ha="center", va="bottom", fontsize=font_size)
    if tile.label:
        axes.text(left - 0.08, top + height / 2, tile.label, ha="right", va="center", fontsize=font_size - 1)
    if tile.caption:
        axes.text(middle, bottom + 0.03, tile.caption, ha="center", va="top", fontsize=9, color=GREY)
    if tile.box is not None:
        down, across = (size / count for size, count in zip((height, width), tile.pixels.shape, strict=False))
        corner = left + tile.box[0] * across, top + tile.box[1] * down
        size = tile.box[2] * across, tile.box[3] * down
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_FRAME, linewidth=2, clip_on=False))


_TILE = 1.25  # inches
_LEAST_WIDTH = 4  # tiles, which headings need
_MOST_IN_A_LINE = 8


def draw_attention(
    pictures: Float[np.ndarray, "b hh ww 3"],
    heads: Float[np.ndarray, "b h gh gw"],
    saliency: Float[np.ndarray, "b gh gw"],
) -> Figure:
    """Draw what the class token attends to in each image, see `attention_tiles`.

    Args:
        pictures: the images, in [0, 1].
        heads: attention to each place, of each head.
        saliency: of all heads together.
    """
    heading = (
        "Attention of the class token, each map from 0 (dark) to its largest value; "
        "below: that value over the map's mean (1 is uniform attention)"
    )
    return draw_tiles(attention_tiles(pictures, heads, saliency), tile_width=_TILE, heading=heading)


def attention_tiles(
    pictures: Float[np.ndarray, "b hh ww 3"],
    heads: Float[np.ndarray, "b h gh gw"],
    saliency: Float[np.ndarray, "b gh gw"],
) -> list[list[Tile | None]]:
    """A row for each image, or several for many heads: the image, all heads together, their foreground, each head.

    A map's colours go from 0 to its own largest value, so that uniform attention is bright all over. The foreground is
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
        f"of all images' tokens together: {explained[0].sum():.0%} of their variance"
        if joint
        else "of each image's tokens; below: their share of the variance"
    )
    return draw_tiles(rows, tile_width=_TILE, heading=f"Three principal components {text}")


def _lines(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """As few lines as are not too long, of about one length."""
    per_line = math.ceil(len(tiles) / math.ceil(len(tiles) / _MOST_IN_A_LINE))
    return [list(tiles[i : i + per_line]) for i in range(0, len(tiles), per_line)]


_LEAST_WINDOW = 5  # patches along the shorter side of an image
_LEAST_SHARE, _FEW = 0.001, 0.1
_WHY = {"named": "", "matters": "matters", "energy": "most energy", "random": "at random"}


def draw_atoms(gallery: Gallery) -> Figure:
    """Draw what activates atoms, where, and what the decoder draws when they are raised, see `atom_tiles`."""
    heading = (
        f"Layer {gallery.atoms[0].layer}. Mean patch: weighted by activation, less the average patch. Drawn: "
        "change of hidden pixels when the atom is raised by its standard deviation; grey is no change. Linear: "
        "cosine of that change with the linear response (in brackets: in random directions)"
    )
    return draw_tiles(atom_tiles(gallery), tile_width=_TILE, heading=heading)


def atom_tiles(gallery: Gallery) -> list[list[Tile | None]]:
    """A row for each atom: mean patch, where it is active, its strongest patches in their surroundings, what is drawn.

    The mean patch is drawn as its difference from the average patch, on one scale for all atoms, and the drawing as the
    change of hidden pixels, on a scale of its own; grey is no difference, and below stands the largest that fits.
    """
    most = max(map(len, gallery.strongest), default=0)
    titles = ["mean patch", "where", *["strongest", *(f"no. {i + 2}" for i in range(most))][:most], "drawn"]
    scale = float(np.abs(gallery.mean_patches).max())
    rows: list[list[Tile | None]] = []
    for place, atom in enumerate(gallery.atoms):
        drawn = gallery.drawn[place]
        strongest = [_in_surroundings(gallery, *found) for found in gallery.strongest[place]]
        row = [
            _difference(gallery.mean_patches[place], scale)._replace(label=_of_atom(atom)),
            heat(gallery.places[place]),
            *strongest,
            *[None] * (most - len(strongest)),
            _difference(drawn, float(np.abs(drawn).max())),
        ]
        if place == 0:
            row = [tile and tile._replace(title=title) for tile, title in zip(row, titles, strict=True)]
        rows.append(row)
    return rows


def _difference(pixels: Float[np.ndarray, "hh ww 3"], largest: float) -> Tile:
    return Tile(0.5 + pixels / (2 * largest or 1.0), caption=f"±{largest:.2g}")


def _of_atom(atom: Atom) -> str:
    """The numbers of an atom in a few lines."""
    share = percent(atom.share, 1) if atom.share >= _LEAST_SHARE else f"under {percent(_LEAST_SHARE, 1)}"
    lines = [f"atom {atom.index}", _WHY[atom.chosen], f"{share} of energy"]
    lines.append(f"active in {percent(atom.active, int(atom.active < _FEW))}" if atom.active else "never active")
    if atom.cosine is not None:
        random = "" if atom.random_cosine is None else f" ({atom.random_cosine:.3f})"
        lines.append(f"linear {atom.cosine:.3f}{random}")
    return "\n".join(filter(None, lines))


def _in_surroundings(gallery: Gallery, image: int, patch: int, activation: float) -> Tile:
    """The part of an image around a patch, which is framed, in the image's proportions."""
    picture, grid = gallery.pictures[image], gallery.places.shape[1:]
    size = picture.shape[:2]
    share = min(1.0, _LEAST_WINDOW / min(grid))
    side = [length // count for length, count in zip(size, grid, strict=True)]
    corner = [at * length for at, length in zip(divmod(patch, grid[1]), side, strict=True)]
    extent = [round(share * length) for length in size]
    top, left = (
        min(max(at + half // 2 - long // 2, 0), whole - long)
        for at, half, long, whole in zip(corner, side, extent, size, strict=True)
    )
    window = picture[top : top + extent[0], left : left + extent[1]]
    return Tile(window, caption=f"{activation:.2g}", box=(corner[1] - left, corner[0] - top, side[1], side[0]))
