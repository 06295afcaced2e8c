"""Small pictures in rows: images, maps as heat, tokens as colours, foregrounds. Every figure of them is drawn here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crate_mae.drawing.style import GREY, new_figure, panels

_CAPTION, _GAP, _TITLE_LINE, _HEADING = 0.2, 0.05, 0.22, 0.5  # inches
_VEIL = np.array([0.0, 0.45, 0.7])  # the colour that lies over what is not foreground
_VEILED = 0.8  # how much of it
_FRAME = "#D55E00"
_HEAT = "cividis"  # which looks the same to people of all kinds of colour vision
_ROOMY, _NARROW = 1.3, 1.0  # inches of a tile below which titles become smaller

Box = tuple[float, float, float, float]  # left, top, width, height, in pixels


class Tile(NamedTuple):
    """One small picture.

    Attributes:
        pixels: hh ww 3 in [0, 1], or gh gw not negative, which is drawn as heat from 0 to its own largest value.
        title: above it.
        caption: below it.
        box: a frame on it.
    """

    pixels: Float[np.ndarray, "hh ww 3"] | Float[np.ndarray, "gh gw"]
    title: str = ""
    caption: str = ""
    box: Box | None = None


Tiles = Sequence[Sequence[Tile | None]]  # rows, in which None keeps a place empty


def heat(values: Float[np.ndarray, "gh gw"], title: str = "") -> Tile:
    """A map of what is looked at; below it its largest value over its mean, 1 for even attention."""
    largest, mean = float(values.max()), float(values.mean())
    return Tile(values, title, f"{largest / mean:.1f}" if mean else "none")


def cut_out(picture: Float[np.ndarray, "hh ww 3"], kept: Bool[np.ndarray, "gh gw"], title: str = "") -> Tile:
    """A picture under a blue veil, but for the patches that are kept."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(picture.shape, kept.shape, strict=False))
    veiled = _VEILED * _VEIL + (1 - _VEILED) * picture
    return Tile(np.where(kept[np.ix_(rows, columns)][..., None], picture, veiled).astype(picture.dtype), title)


def titled(columns: Sequence[str], rows: Sequence[Sequence[Tile]]) -> list[list[Tile]]:
    """Rows of which the first has a title over each tile."""
    first, *rest = rows
    named = [tile._replace(title=title) for tile, title in zip(first, columns, strict=False)]
    return [[*named, *first[len(named) :]], *map(list, rest)]


def draw_tiles(rows: Tiles, *, tile_width: float, heading: str = "") -> Figure:
    """A figure of tiles, all of the shape of the first.

    Args:
        rows: need not be of one length.
        tile_width: in inches.
        heading: above all.
    """
    shown = [tile for row in rows for tile in row if tile is not None]
    columns = max(len(row) for row in rows)
    aspect = shown[0].pixels.shape[0] / shown[0].pixels.shape[1]
    below = _CAPTION if any(tile.caption for tile in shown) else _GAP
    above = _TITLE_LINE * (1 + max(tile.title.count("\n") for tile in shown))
    height = len(rows) * (tile_width * aspect + below) + above + (_HEADING if heading else 0)
    figure = new_figure(tile_width * columns, height)
    axes = panels(figure, len(rows), columns)
    for place in axes.flat:
        place.set_box_aspect(aspect)
        place.set_axis_off()
    for places, row in zip(axes, rows, strict=True):
        for place, tile in zip(places, row, strict=False):
            if tile is not None:
                _draw_tile(place, tile, _font_size(tile_width))
    if heading:
        figure.suptitle(heading, fontsize=10, color=GREY)
    return figure


def _font_size(tile_width: float) -> float:
    return 10.5 if tile_width > _ROOMY else 9.0 if tile_width > _NARROW else 8.0


def _draw_tile(axes: Any, tile: Tile, font_size: float) -> None:
    colours = {"cmap": _HEAT, "vmin": 0.0, "vmax": float(tile.pixels.max()) or 1.0} if tile.pixels.ndim == 2 else {}
    axes.imshow(tile.pixels, interpolation="nearest", aspect="auto", **colours)
    axes.set_title(tile.title, fontsize=font_size, pad=3)
    if tile.caption:
        axes.text(0.5, -0.03, tile.caption, transform=axes.transAxes, ha="center", va="top", fontsize=9, color=GREY)
    if tile.box is not None:
        left, top, width, height = tile.box
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=_FRAME, linewidth=2)
        frame.set_clip_on(False)
        axes.add_patch(frame)
