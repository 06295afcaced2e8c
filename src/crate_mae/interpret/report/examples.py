"""What a report shows rather than measures: completions, attention, foregrounds, tokens as colours, and neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from crate_mae.data.base import fixed_sample
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.reconstruction import complete_in_batches, completion_quality, nested_masks, read_images
from crate_mae.interpret.attention import ClassAttention, class_attention
from crate_mae.interpret.foregrounds import mass_mask, principal_mask
from crate_mae.interpret.measure import Opened
from crate_mae.interpret.pictures import Box, Tile, Tiles, attention_tiles, cut_out, draw_tiles, heat, titled
from crate_mae.interpret.report.subjects import LABELS, Subject
from crate_mae.interpret.tokens import Neighbours, encode_patches, nearest_tokens, shown_images, token_colours
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.tracing import layers_of

DEFAULT_MASK_RATIO = 0.75  # of completions, if that of the training is not known
_DRAWN = ("model", "random", "baseline")
_DRAWN_IMAGES = 4
_COMPLETED = 8
_POOL = 64  # images among which neighbours are searched
_NEIGHBOURS = 5
_WIDTH = 11.0  # inches
_FEWEST_COLUMNS = 6  # fewer pictures in a row are not drawn larger
_MOST_LAYERS = 6
_SIDE_BY_SIDE = 2  # completions in a row
_TITLE_WIDTH = 16  # characters
_FINE = 28  # cells along the shorter side of a map; fewer where there are fewer pixels


class Completed(NamedTuple):
    """Completions of a few images.

    Attributes:
        pictures: original, masked, prediction, completed, in [0, 1].
        psnr: of the hidden patches of each, in decibels.
        mask_ratio: share of patches that was hidden.
        own_statistics: whether brightness and contrast of each patch come from the original.
    """

    pictures: list[Float[np.ndarray, "b hh ww 3"]]
    psnr: list[float]
    mask_ratio: float
    own_statistics: bool


class Attention(NamedTuple):
    """What class tokens attend to.

    Attributes:
        fine: of the last layer, on a grid finer than that of the patches.
        saliency: of every layer, mean over heads, on the grid of the patches.
        mass: foreground by the last layer's saliency.
    """

    fine: ClassAttention
    saliency: Float[Tensor, "l b gh gw"]
    mass: Bool[Tensor, "b gh gw"]


@dataclass(frozen=True, kw_only=True)
class Visuals:
    """What one network makes of the drawn images.

    Attributes:
        pictures: the images as it gets them, in [0, 1].
        attention: None for a network without a class token or without traceable attention.
        principal: foreground by the first principal component of the last layer's tokens.
        colours: three principal components of these tokens, over all drawn images.
        own_colours: the same, of each image by itself.
    """

    pictures: Float[np.ndarray, "b hh ww 3"]
    attention: Attention | None
    principal: Bool[Tensor, "b gh gw"]
    colours: Float[np.ndarray, "b gh gw 3"]
    own_colours: Float[np.ndarray, "b gh gw 3"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A patch of one image, and the patches of other images whose tokens are most like its token.

    Attributes:
        image: number of the image among those of `Examples.pool`.
        token: number of the patch in it.
        neighbours: see `interpret.tokens.nearest_tokens`.
    """

    image: int
    token: int
    neighbours: Neighbours


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Everything that is drawn.

    Attributes:
        completed: None for a model without a decoder.
        visuals: of the model and of the other networks, by their keys.
        pool: pictures in [0, 1] among which neighbours were searched.
        matches: of a patch of each drawn image.
        left_out: what is missing, and why.
    """

    completed: Completed | None
    visuals: dict[str, Visuals]
    pool: Float[np.ndarray, "k hh ww 3"]
    matches: list[Match]
    left_out: dict[str, str]


def collect_examples(subjects: dict[str, Subject], *, count: int, mask_ratio: float, seed: int) -> Examples:
    """Draw a few of the measured images, chosen by the seed.

    Args:
        subjects: the model among them.
        count: how many images of each were measured.
        mask_ratio: of completions.
        seed: of the choice, and of the masks.
    """
    model = subjects["model"]
    left_out: dict[str, str] = {}
    images = _images(model, count, seed, _POOL)
    completed = None
    if isinstance(model.opened.net, MaskedAutoencoder):
        completed = _complete(model.opened.net, images[:_COMPLETED], mask_ratio, seed)
    else:
        left_out["completions"] = "the model has no decoder"
    visuals: dict[str, Visuals] = {}
    for key, subject in subjects.items():
        if key not in _DRAWN:
            continue
        if grid_size(subject.opened.backbone.encoder) is None:
            left_out[f"pictures of tokens and attention, {subject.label}"] = "its patches lie on no grid"
            continue
        attention, why_not = _attention(
            subject.opened.backbone.encoder, drawn := _images(subject, count, seed, _DRAWN_IMAGES)
        )
        if attention is None:
            left_out[f"attention maps, {subject.label}"] = why_not
        visuals[key] = _visuals(subject.opened.backbone, drawn, attention)
    matches = _matches(model.opened, images, visuals.get("model"))
    if not matches and "model" in visuals:
        left_out["neighbours of tokens"] = "they are searched in other images, and there is only one"
    pool = _pictures(model.opened.backbone, images)
    return Examples(completed=completed, visuals=visuals, pool=pool, matches=matches, left_out=left_out)


def grid_size(encoder: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of an encoder's patches."""
    size: Any = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def _images(subject: Subject, count: int, seed: int, most: int) -> Float[Tensor, "b c hh ww"]:
    """Some of the images that are measured, as the subject's network gets them; the same for every network."""
    measured = fixed_sample(len(subject.source), count, seed)
    order = np.random.default_rng(seed).permutation(measured).tolist()  # else those of one class might come first
    return read_images(subject.source, subject.opened.backbone.transform(), order, most).images


def _complete(net: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], mask_ratio: float, seed: int) -> Completed:
    masks = nested_masks(len(images), net.num_patches, mask_ratio, seed)
    completion = complete_in_batches(net, images, masks)
    psnr = completion_quality(completion, masks, net.config.patch_size).psnr.tolist()
    as_it_is = (0.0,) * net.config.in_chans, (1.0,) * net.config.in_chans  # mean and deviation
    pictures = [shown_images(kind, *as_it_is) for kind in completion]
    return Completed(pictures, psnr, mask_ratio, net.config.norm_pix_loss)


def _visuals(backbone: Backbone, images: Float[Tensor, "b c hh ww"], attention: Attention | None) -> Visuals:
    grid = grid_size(backbone.encoder)
    assert grid is not None, "the caller has checked"
    patches = encode_patches(backbone.encoder, images)
    return Visuals(
        pictures=_pictures(backbone, images),
        attention=attention,
        principal=principal_mask(patches, grid),
        colours=token_colours(patches, grid).pictures,
        own_colours=token_colours(patches, grid, joint=False).pictures,
    )


def _attention(encoder: nn.Module, images: Float[Tensor, "b c hh ww"]) -> tuple[Attention | None, str]:
    """What the class token attends to, or the reason why there is no map. One layer at a time saves memory."""
    try:
        layers = [class_attention(encoder, images, layer=layer) for layer in range(len(layers_of(encoder)))]
        fine = class_attention(encoder, images, stride=_stride(encoder, images))
    except UserError as error:
        return None, str(error)
    saliency = torch.stack([found.saliency for found in layers])
    return Attention(fine, saliency, mass_mask(saliency[-1])), ""


def _stride(encoder: nn.Module, images: Float[Tensor, "b c hh ww"]) -> int:
    """The coarsest stride whose maps have at least `_FINE` cells, of those that divide the patches."""
    grid = grid_size(encoder)
    assert grid is not None, "the caller has checked"
    shorter = min(images.shape[2:])
    patch = math.gcd(images.shape[2] // grid[0], images.shape[3] // grid[1])
    strides = [stride for stride in range(1, patch + 1) if patch % stride == 0]
    return max((stride for stride in strides if shorter // stride >= _FINE), default=1)


def _matches(model: Opened, images: Float[Tensor, "b c hh ww"], visuals: Visuals | None) -> list[Match]:
    """Neighbours of the patch of each image that its class token attends to most, or of the middle one."""
    encoder = model.backbone.encoder
    if len(images) < 2 or visuals is None:
        return []
    patches = encode_patches(encoder, images)
    gh, gw = visuals.principal.shape[1:]
    tokens = [gh // 2 * gw + gw // 2] * min(_DRAWN_IMAGES, len(images))
    if visuals.attention is not None:
        tokens = visuals.attention.saliency[-1].flatten(1).argmax(1).tolist()
    return [
        Match(image=i, token=token, neighbours=nearest_tokens(patches, i, token, _NEIGHBOURS))
        for i, token in enumerate(tokens)
    ]


def _pictures(backbone: Backbone, images: Float[Tensor, "b c hh ww"]) -> Float[np.ndarray, "b hh ww 3"]:
    return shown_images(images, backbone.mean, backbone.std)


class Grid(NamedTuple):
    """A figure of tiles.

    Attributes:
        name: of its files.
        title: as text.
        caption: two sentences on how to read it.
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
        "hidden), its prediction of the hidden patches, and the completed image. Compare the "
        f"last with the first; the number is the PSNR of hidden patches, where more is better.{own}",
        titled(["original", "masked", "prediction", "completed"] * min(_SIDE_BY_SIDE, len(halves)), rows),
    )


def attention_grids(examples: Examples) -> list[Grid]:
    """The figures of what class tokens attend to, and of foregrounds."""
    visuals = examples.visuals
    found = []
    if "model" in visuals and visuals["model"].attention is not None:
        found += [_heads(visuals["model"]), _saliency(visuals["model"])]
    return [*found, _foregrounds(visuals)] if visuals else found


def token_grids(examples: Examples) -> list[Grid]:
    """The figures of tokens: as colours, and with their neighbours."""
    found = [_colours(examples.visuals)] if examples.visuals else []
    return [*found, _neighbours(examples)] if examples.matches else found


def draw_grid(grid: Grid) -> Figure:
    """All tiles of a figure, on the width of the page."""
    columns = max(_FEWEST_COLUMNS, *(len(row) for row in grid.rows))
    rows = [[*row, *[None] * (columns - len(row))] for row in grid.rows]
    return draw_tiles(rows, tile_width=_WIDTH / columns)


def _heads(visuals: Visuals) -> Grid:
    assert visuals.attention is not None, "the caller has checked"
    fine = visuals.attention.fine
    return Grid(
        "heads",
        "Attention of each head",
        "For each image, how much the class token attends to each place in the last encoder layer, all heads together "
        "and each by itself: bright is much, and each map is scaled to its own largest value, which stands below as a "
        "multiple of the map’s mean (1 is even attention). Heads with subspaces of their own should light up on "
        "different things; equal maps mean that heads do the same.",
        attention_tiles(visuals.pictures, fine.heads.cpu().numpy(), fine.saliency.cpu().numpy()),
    )


def _saliency(visuals: Visuals) -> Grid:
    assert visuals.attention is not None, "the caller has checked"
    saliency = visuals.attention.saliency.cpu().numpy()
    layers = sorted(set(np.linspace(0, len(saliency) - 1, min(_MOST_LAYERS, len(saliency))).round().astype(int)))
    rows = [
        [Tile(picture), *(heat(saliency[layer, i]) for layer in layers)] for i, picture in enumerate(visuals.pictures)
    ]
    return Grid(
        "saliency",
        "What the class token attends to, by layer",
        "The class token’s attention to patches, mean over heads, in layers of the encoder from the first to the last. "
        "Look for the layer from which on the bright patches follow a thing rather than places; below each map stands "
        "its largest value over its mean, which is 1 for even attention.",
        titled(["image", *(f"layer {layer}" for layer in layers)], rows),
    )


def _foregrounds(visuals: dict[str, Visuals]) -> Grid:
    columns = []
    for key, found in visuals.items():
        kinds = [("by attention", found.attention.mass)] if found.attention is not None else []
        for kind, masks in [*kinds, ("by component", found.principal)]:
            tiles = [cut_out(*pair) for pair in zip(found.pictures, masks.cpu().numpy(), strict=True)]
            columns.append((key, kind, tiles))
    return Grid(
        "foregrounds",
        "Foregrounds found without labels",
        "What is not covered in blue is foreground: by attention, the fewest patches with 60% of the class token’s "
        "attention in the last layer; by component, one side of the tokens’ first principal component. Compare with "
        "random initialisation, which cuts out something too: only a better cut was learned.",
        _beside_images(visuals, columns),
    )


def _colours(visuals: dict[str, Visuals]) -> Grid:
    columns = []
    for key, found in visuals.items():
        kinds = [("each by itself", found.own_colours)] if key == "model" else []
        for kind, pictures in [*kinds, ("all together", found.colours)]:
            columns.append((key, kind, [Tile(picture) for picture in pictures]))
    return Grid(
        "token_colours",
        "Tokens as colours",
        "Three principal components of the last encoder layer’s tokens as red, green and blue, one colour a patch. "
        "“Each by itself” has components of its own for every image; “all together” shares them, so that one colour "
        "means one thing in all images, and patches of one kind should share it.",
        _beside_images(visuals, columns),
    )


def _beside_images(visuals: dict[str, Visuals], columns: Sequence[tuple[str, str, Sequence[Tile]]]) -> Tiles:
    """A row for each image: the image, then a tile of each column, titled by its network and kind."""
    pictures = next(iter(visuals.values())).pictures
    titles = ["image", *("\n".join([*wrap(f"{LABELS[key]}:", _TITLE_WIDTH), kind]) for key, kind, _ in columns)]
    rows = [[Tile(picture), *(tiles[i] for _, _, tiles in columns)] for i, picture in enumerate(pictures)]
    return titled(titles, rows)


def _neighbours(examples: Examples) -> Grid:
    visuals = next(iter(examples.visuals.values()))
    grid = visuals.principal.shape[1:]
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
        "Left, framed, the patch of an image with most of the class token’s attention; then patches of other images "
        "whose tokens are most like its token, at most one an image, with their cosines. Patches that show the same "
        "kind of thing mean that tokens encode content; patches at the same place mean that they encode position.",
        titled(["patch", *(f"neighbour {i + 1}" for i in range(most))], [row(match) for match in examples.matches]),
    )


def _box(token: int, grid: tuple[int, int], shape: tuple[int, ...]) -> Box:
    """Where a patch is."""
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    return token % grid[1] * width, token // grid[1] * height, width, height
