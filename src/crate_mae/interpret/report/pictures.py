"""Figures of images: completions, attention, foregrounds, tokens as colours, neighbours."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from crate_mae.interpret.pictures.figures import attention_tiles
from crate_mae.interpret.pictures.tiles import Box, Tile, Tiles, cut_out, draw_tiles, heat, titled
from crate_mae.interpret.report.examples import Completed, Examples, Look, Match
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.subjects import LABELS

_WIDTH = 11.0  # inches
_FEWEST_COLUMNS = 6  # fewer pictures in a row are not drawn larger
_MOST_LAYERS = 6
_SIDE_BY_SIDE = 2  # completions in a row


class Grid(NamedTuple):
    """A figure of tiles.

    Attributes:
        name: of its files.
        title: as text.
        caption: two sentences on how to read it, as HTML.
        rows: of tiles.
    """

    name: str
    title: str
    caption: str
    rows: Tiles


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
        titled(["original", "masked", "completed", "pasted"] * min(_SIDE_BY_SIDE, len(halves)), rows),
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
    """All tiles of a figure, on the width of the page."""
    columns = max(_FEWEST_COLUMNS, *(len(row) for row in grid.rows))
    rows = [[*row, *[None] * (columns - len(row))] for row in grid.rows]
    return draw_tiles(rows, tile_width=_WIDTH / columns)


def _heads(look: Look) -> Grid:
    assert look.attention is not None, "whoever asks has seen to it"
    fine = look.attention.fine
    return Grid(
        "heads",
        "Attention of each head",
        "For each image, how much the class token looks at each place in the last encoder layer, all heads together "
        "and each by itself: bright is much, and each map is scaled to its own largest value, which stands below as a "
        "multiple of the map’s mean (1 is even attention). Heads that are subspaces of their own should light up on "
        "different things; equal maps say that heads do the same.",
        attention_tiles(look.pictures, fine.heads.cpu().numpy(), fine.saliency.cpu().numpy()),
    )


def _saliency(look: Look) -> Grid:
    assert look.attention is not None, "whoever asks has seen to it"
    saliency = look.attention.saliency.cpu().numpy()
    layers = sorted(set(np.linspace(0, len(saliency) - 1, min(_MOST_LAYERS, len(saliency))).round().astype(int)))
    rows = [[Tile(picture), *(heat(saliency[layer, i]) for layer in layers)] for i, picture in enumerate(look.pictures)]
    return Grid(
        "saliency",
        "What the class token looks at, by layer",
        "The class token’s attention to patches, mean over heads, in layers of the encoder from the first to the last. "
        "Look for the layer from which on the bright patches follow a thing rather than places; below each map stands "
        "its largest value over its mean, which is 1 for even attention.",
        titled(["image", *(f"layer {layer}" for layer in layers)], rows),
    )


def _foregrounds(looks: dict[str, Look]) -> Grid:
    columns, rows = ["image"], [[Tile(picture)] for picture in next(iter(looks.values())).pictures]
    for key, look in looks.items():
        kinds = [("by attention", look.attention.mass)] if look.attention is not None else []
        for kind, masks in [*kinds, ("by component", look.principal)]:
            columns.append(f"{LABELS[key]}:\n{kind}")
            for row, picture, mask in zip(rows, look.pictures, masks.cpu().numpy(), strict=True):
                row.append(cut_out(picture, mask))
    return Grid(
        "foregrounds",
        "Foregrounds that nobody taught",
        "What lies under no blue is foreground: by attention, the fewest patches with 60% of the class token’s "
        "attention in the last layer; by component, one side of the tokens’ first principal component. Compare with "
        "random weights, which cut out something too: only a better cut than theirs was learned.",
        titled(columns, rows),
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
        titled(columns, rows),
    )


def _neighbours(examples: Examples) -> Grid:
    look = next(iter(examples.looks.values()))
    grid = look.principal.shape[1:]
    most = max(len(match.neighbours.image[0]) for match in examples.matches)

    def tile(image: int, token: int, caption: str) -> Tile:
        picture = examples.pool[image]
        return Tile(picture, caption=caption, box=_box(token, (grid[0], grid[1]), picture.shape))

    def row(match: Match) -> list[Tile]:
        found = zip(*(values[0].tolist() for values in match.neighbours), strict=True)
        return [tile(match.image, match.token, ""), *(tile(i, token, f"{cos:.2f}") for i, token, cos in found)]

    return Grid(
        "neighbours",
        "Nearest patches of other images",
        "Left, the patch of an image that the class token looks at most, in a frame; then the patches of other images "
        "whose tokens are most like its token, at most one an image, with their cosines. Patches that show the same "
        "kind of thing say that tokens mean something; patches at the same place say that they know places.",
        titled(["patch", *(f"neighbour {i + 1}" for i in range(most))], [row(match) for match in examples.matches]),
    )


def _box(token: int, grid: tuple[int, int], shape: tuple[int, ...]) -> Box:
    """Where a patch is."""
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    return token % grid[1] * width, token // grid[1] * height, width, height
