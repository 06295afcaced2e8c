"""Figures of images: completions, attention, foregrounds, tokens as colours, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from crate_mae.drawing.style import new_figure, panels
from crate_mae.interpret.report.examples import Completed, Examples, Look, Match
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.subjects import LABELS

_WIDTH, _TITLE_HEIGHT = 11.0, 0.35  # inches
_FEWEST_COLUMNS = 6  # fewer pictures in a row are not drawn larger
_MOST_LAYERS = 6
_SIDE_BY_SIDE = 2  # completions in a row
_VEIL = np.array([0.0, 0.45, 0.7])  # the colour that lies over what is not foreground
_VEILED = 0.8  # how much of it
_FRAME = "#D55E00"
_HEAT = "cividis"  # which looks the same to people of all kinds of colour vision

Box = tuple[float, float, float, float]  # left, top, width, height, in pixels


class Tile(NamedTuple):
    """One small picture.

    Attributes:
        pixels: hh ww 3 in [0, 1], or gh gw not negative, which is drawn as heat from 0 to its own largest value.
        box: a frame on it.
        caption: below it.
    """

    pixels: Float[np.ndarray, "hh ww 3"] | Float[np.ndarray, "gh gw"]
    box: Box | None = None
    caption: str = ""


class Grid(NamedTuple):
    """A figure of tiles.

    Attributes:
        name: of its files.
        title: as text.
        caption: two sentences on how to read it, as HTML.
        columns: titles of the columns.
        rows: of tiles.
    """

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Tile]]


def completion_grid(completed: Completed) -> Grid:
    """The figure of completed images."""
    own = (
        " Brightness and contrast of each patch come from the original, since targets were normalised."
        if completed.own_statistics
        else ""
    )
    halves = [
        [*(Tile(picture) for picture in row[:3]), Tile(row[3], caption=f"{psnr:.1f} dB")]
        for row, psnr in zip(zip(*completed.pictures, strict=True), completed.psnr, strict=True)
    ]
    rows = [list(chain(*halves[i : i + _SIDE_BY_SIDE])) for i in range(0, len(halves), _SIDE_BY_SIDE)]
    return Grid(
        "completions",
        "Completions",
        f"From left to right: an image, what the model saw of it ({100 * completed.mask_ratio:g}% of the patches "
        "hidden), what it predicts everywhere, and the prediction pasted into the holes of the original. Compare the "
        f"last with the first; the number is the PSNR of hidden patches, of which more is better.{own}",
        ["original", "masked", "completed", "pasted"] * min(_SIDE_BY_SIDE, len(halves)),
        rows,
    )


def attention_grids(inspection: Inspection) -> list[Grid]:
    """The figures of what class tokens look at, and of foregrounds."""
    looks = inspection.examples.looks
    found = []
    if "model" in looks and looks["model"].attention is not None:
        found += [_heads(looks["model"]), _saliency(looks["model"])]
    return [*found, _foregrounds(looks)] if looks else found


def token_grids(inspection: Inspection) -> list[Grid]:
    """The figures of what tokens are like."""
    examples = inspection.examples
    found = [_colours(examples.looks)] if examples.looks else []
    return [*found, _neighbours(examples)] if examples.matches else found


def draw_grid(grid: Grid) -> Figure:
    """All tiles of a figure in rows and columns."""
    columns = max(len(grid.columns), _FEWEST_COLUMNS)
    shape = grid.rows[0][0].pixels.shape
    captioned = any(tile.caption for row in grid.rows for tile in row)
    height = _WIDTH / columns * shape[0] / shape[1] + (0.22 if captioned else 0.05)
    figure = new_figure(_WIDTH, len(grid.rows) * height + _TITLE_HEIGHT)
    axes = panels(figure, len(grid.rows), columns)
    for place in axes.ravel():
        place.set_axis_off()
    for row, tiles in zip(axes, grid.rows, strict=True):
        for place, tile in zip(row, tiles, strict=False):
            _draw_tile(place, tile)
    small = columns > 2 * _FEWEST_COLUMNS
    for place, title in zip(axes[0], grid.columns, strict=False):
        place.set_title(title, fontsize=8.5 if small else 10.5)
    return figure


def _draw_tile(axes: Any, tile: Tile) -> None:
    if tile.pixels.ndim == 3:
        axes.imshow(tile.pixels, interpolation="nearest")
    else:
        axes.imshow(tile.pixels, interpolation="nearest", cmap=_HEAT, vmin=0, vmax=max(tile.pixels.max(), 1e-12))
    if tile.box is not None:
        left, top, width, height = tile.box
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=_FRAME, linewidth=2)
        frame.set_clip_on(False)
        axes.add_patch(frame)
    if tile.caption:
        axes.text(0.5, -0.04, tile.caption, transform=axes.transAxes, ha="center", va="top", fontsize=9.5)


def _heads(look: Look) -> Grid:
    assert look.attention is not None, "whoever asks has seen to it"
    heads = look.attention.heads.cpu().numpy()
    rows = [
        [Tile(picture), *(Tile(share) for share in shares)]
        for picture, shares in zip(look.pictures, heads, strict=True)
    ]
    return Grid(
        "heads",
        "Attention of each head",
        "For each image, how much each head of the last encoder layer has the class token look at each place: bright "
        "is much, and each map is scaled to its own largest value. Heads that are subspaces of their own should light "
        "up on different things; equal maps say that heads do the same.",
        ["image", *(f"head {i}" for i in range(heads.shape[1]))],
        rows,
    )


def _saliency(look: Look) -> Grid:
    assert look.attention is not None, "whoever asks has seen to it"
    saliency = look.attention.saliency.cpu().numpy()
    layers = sorted(set(np.linspace(0, len(saliency) - 1, min(_MOST_LAYERS, len(saliency))).round().astype(int)))
    rows = [[Tile(picture), *(Tile(saliency[layer, i]) for layer in layers)] for i, picture in enumerate(look.pictures)]
    return Grid(
        "saliency",
        "What the class token looks at, by layer",
        "The class token’s attention to patches, mean over heads, in layers of the encoder from the first to the last. "
        "Look for the layer from which on the bright patches follow a thing rather than places.",
        ["image", *(f"layer {layer}" for layer in layers)],
        rows,
    )


def _foregrounds(looks: dict[str, Look]) -> Grid:
    columns, cells = ["image"], []
    first = next(iter(looks.values()))
    for key, look in looks.items():
        if look.attention is not None:
            columns.append(f"{LABELS[key]}:\nby attention")
            cells.append(_cut_out(look, look.attention.mass))
        columns.append(f"{LABELS[key]}:\nby component")
        cells.append(_cut_out(look, look.principal))
    rows = [[Tile(picture), *(cell(i) for cell in cells)] for i, picture in enumerate(first.pictures)]
    return Grid(
        "foregrounds",
        "Foregrounds that nobody taught",
        "What lies under no blue is foreground: by attention, the fewest patches with 60% of the class token’s "
        "attention in the last layer; by component, one side of the tokens’ first principal component. Compare with "
        "random weights, which cut out something too: only a better cut than theirs was learned.",
        columns,
        rows,
    )


def _colours(looks: dict[str, Look]) -> Grid:
    columns, rows = ["image"], [[Tile(picture)] for picture in next(iter(looks.values())).pictures]
    for key, look in looks.items():
        kinds = [("each by itself", look.own_colours)] if key == "model" else []
        for kind, pictures in [*kinds, ("all together", look.colours)]:
            columns.append(f"{LABELS[key]}:\n{kind}")
            for row, picture in zip(rows, pictures, strict=True):
                row.append(Tile(picture))
    return Grid(
        "token_colours",
        "Tokens as colours",
        "Three principal components of the last encoder layer’s tokens as red, green and blue, one colour a patch. "
        "“Each by itself” has components of its own for every image; “all together” shares them, so that one colour "
        "means one thing in all images, and patches of one kind should share it.",
        columns,
        rows,
    )


def _neighbours(examples: Examples) -> Grid:
    look = next(iter(examples.looks.values()))
    grid = look.principal.shape[1:]
    most = max(len(match.neighbours.image[0]) for match in examples.matches)

    def tile(image: int, token: int, caption: str) -> Tile:
        picture = examples.pool[image]
        return Tile(picture, _box(token, (grid[0], grid[1]), picture.shape), caption)

    def row(match: Match) -> list[Tile]:
        found = zip(*(values[0].tolist() for values in match.neighbours), strict=True)
        return [tile(match.image, match.token, ""), *(tile(i, token, f"{cos:.2f}") for i, token, cos in found)]

    return Grid(
        "neighbours",
        "Nearest patches of other images",
        "Left, the patch of an image that the class token looks at most, in a frame; then the patches of other images "
        "whose tokens are most like its token, at most one an image, with their cosines. Patches that show the same "
        "kind of thing say that tokens mean something; patches at the same place say that they know places.",
        ["patch", *(f"neighbour {i + 1}" for i in range(most))],
        [row(match) for match in examples.matches],
    )


def _cut_out(look: Look, masks: Bool[Tensor, "b gh gw"]) -> Callable[[int], Tile]:
    """From the number of an image to its picture, veiled outside of the mask."""

    def tile(i: int) -> Tile:
        picture = look.pictures[i]
        mask = _enlarged(masks[i].cpu().numpy(), picture.shape)
        veiled = _VEILED * _VEIL + (1 - _VEILED) * picture
        return Tile(np.where(mask[..., None], picture, veiled).astype(np.float32))

    return tile


def _enlarged(mask: Bool[np.ndarray, "gh gw"], shape: tuple[int, ...]) -> Bool[np.ndarray, "hh ww"]:
    """A mask of patches as one of pixels."""
    rows, columns = (np.arange(shape[axis]) * mask.shape[axis] // shape[axis] for axis in (0, 1))
    return mask[np.ix_(rows, columns)]


def _box(token: int, grid: tuple[int, int], shape: tuple[int, ...]) -> Box:
    """Where a patch is."""
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    return token % grid[1] * width, token // grid[1] * height, width, height
