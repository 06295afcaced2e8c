"""The figures: arrays in, figure out; nothing is computed that needs a model."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from crate_mae.drawing.style import GREY, new_figure, panels
from crate_mae.interpret.attention_maps import mass_mask

FOREGROUND_MASS = 0.6  # DINO's share of the attention that makes the foreground
_CELL = 1.25  # inches
_CAPTION = 0.15  # inches under a map
_TITLE = 0.6  # inches above all
_MOST_IN_A_LINE = 8
_FADED = 0.2  # how much is left of what is not looked at


def draw_attention(
    pictures: Float[np.ndarray, "b hh ww 3"],
    heads: Float[np.ndarray, "b h gh gw"],
    saliency: Float[np.ndarray, "b gh gw"],
) -> Figure:
    """What the class token looks at in each image: all heads together, their foreground, and each head.

    A map's colours go from 0 to its own largest value, so that even attention is bright all over. The number under a
    map is that value over the map's mean: 1 for even attention.

    Args:
        pictures: the images, in [0, 1].
        heads: attention to each place, of each head.
        saliency: of all heads together; the foreground is where the largest values make up 60% of it.
    """
    b, h = heads.shape[:2]
    lines = math.ceil(h / _MOST_IN_A_LINE)
    per_line = math.ceil(h / lines)
    figure, axes = _cells(b * lines, 3 + per_line, pictures.shape[1] / pictures.shape[2], caption=_CAPTION)
    foreground = mass_mask(torch.from_numpy(saliency), FOREGROUND_MASS).numpy()
    for number, picture in enumerate(pictures):
        first = lines * number
        shown = ("image", "all heads", f"{FOREGROUND_MASS:.0%} of that") if number == 0 else ("", "", "")
        _show(axes[first, 0], picture, shown[0])
        _show_map(axes[first, 1], saliency[number], shown[1])
        _show(axes[first, 2], _faded(picture, foreground[number]), shown[2])
        for head in range(h):
            line, column = divmod(head, per_line)
            title = f"head {head}" if number == 0 else ""
            _show_map(axes[first + line, 3 + column], heads[number, head], title)
    figure.suptitle(
        "Attention of the class token, each map from 0 (dark) to its largest value;\n"
        "below: that value over the map's mean (1 is even attention)",
        fontsize=10,
        color=GREY,
    )
    return figure


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
    b = len(pictures)
    lines = math.ceil(b / _MOST_IN_A_LINE)
    per_line = math.ceil(b / lines)
    joint = len(explained) == 1 < b
    caption = 0.0 if joint else _CAPTION
    figure, axes = _cells(2 * lines, per_line, pictures.shape[1] / pictures.shape[2], caption=caption)
    for number, picture in enumerate(pictures):
        line, column = divmod(number, per_line)
        _show(axes[2 * line, column], picture)
        _show(axes[2 * line + 1, column], colours[number])
        if not joint:
            axes[2 * line + 1, column].set_xlabel(f"{explained[number].sum():.0%}", fontsize=8, color=GREY)
    text = (
        f"of all images' tokens together:\n{explained[0].sum():.0%} of their variance"
        if joint
        else "of each image's tokens;\nbelow: their share of the variance"
    )
    figure.suptitle(f"Three principal components {text}", fontsize=10, color=GREY)
    return figure


def _cells(rows: int, columns: int, aspect: float, *, caption: float) -> tuple[Figure, Any]:
    """A figure of cells for images of one aspect (height over width), all empty at first."""
    figure = new_figure(max(_CELL * columns, 3.5 * _CELL), (_CELL * aspect + caption) * rows + _TITLE)
    axes = panels(figure, rows, columns)
    for cell in axes.flat:
        cell.set_box_aspect(aspect)
        cell.axis("off")
    return figure, axes


def _show(axes: Any, pixels: np.ndarray, title: str = "", **options: Any) -> None:
    """An image in a cell: sharp edges, no frame, no ticks."""
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.imshow(pixels, interpolation="nearest", aspect="auto", **options)
    axes.set_title(title, fontsize=9)


def _show_map(axes: Any, values: Float[np.ndarray, "gh gw"], title: str) -> None:
    largest, mean = float(values.max()), float(values.mean())
    _show(axes, values, title, cmap="cividis", vmin=0.0, vmax=largest or 1.0)
    axes.set_xlabel(f"{largest / mean:.1f}" if mean else "none", fontsize=8, color=GREY, labelpad=2)


def _faded(picture: Float[np.ndarray, "hh ww 3"], kept: np.ndarray) -> Float[np.ndarray, "hh ww 3"]:
    """The picture, nearly white where its cell of `kept` (gh gw) is false."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(picture.shape, kept.shape, strict=False))
    shown = kept[rows][:, columns, None]
    return np.where(shown, picture, 1 - _FADED * (1 - picture)).astype(picture.dtype)
