"""What a report shows rather than measures: completions, attention, foregrounds, tokens as colours, and neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from crate_mae.data import ImageSource
from crate_mae.data.base import fixed_sample
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.reconstruction import complete_in_batches, completion_quality, nested_masks, read_images
from crate_mae.interpret.attention import ClassAttention, class_attention
from crate_mae.interpret.foregrounds import mass_mask, principal_mask
from crate_mae.interpret.measure import Opened
from crate_mae.interpret.pictures import Tile, Tiles, attention_tiles, cut_out, draw_tiles, heat, titled
from crate_mae.interpret.report.subjects import LABELS, Subjects
from crate_mae.interpret.tokens import encode_patches, grid_size, nearest_tokens, to_pictures, token_colours
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.tracing import layers_of

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


class PlannedFigure(NamedTuple):
    """A figure of the report that is not drawn yet.

    Attributes:
        name: of its files.
        title: as text.
        caption: two sentences on how to read it.
        draw: draws it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is shown of a few images.

    Attributes:
        figures: by the report's section: "model" with completed images, which a model without a decoder does not have;
            "attention" of class tokens, and foregrounds; "tokens" as colours, and with their neighbours.
        mask_ratio: share of patches that was hidden for the completions.
        psnr: of the hidden patches of each completed image, in decibels.
        left_out: what is missing, and why.
    """

    figures: dict[str, list[PlannedFigure]]
    mask_ratio: float
    psnr: list[float]
    left_out: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Visuals:
    """What one network makes of the drawn images.

    Attributes:
        pictures: the images as it gets them, in [0, 1].
        attention: of class tokens in the last layer, on a grid finer than that of the patches; None for a network
            without a class token or without traceable attention.
        saliency: of every layer, mean over heads, on the grid of the patches; None likewise.
        principal: foreground by the first principal component of the last layer's tokens.
        colours: three principal components of these tokens, over all drawn images.
        own_colours: the same, of each image by itself.
    """

    pictures: Float[np.ndarray, "b hh ww 3"]
    attention: ClassAttention | None
    saliency: Float[Tensor, "l b gh gw"] | None
    principal: Bool[Tensor, "b gh gw"]
    colours: Float[np.ndarray, "b gh gw 3"]
    own_colours: Float[np.ndarray, "b gh gw 3"]


def collect_examples(subjects: Subjects, *, count: int, mask_ratio: float, seed: int) -> Examples:
    """Show a few of the measured images, chosen by the seed.

    Args:
        subjects: the model among them.
        count: how many images of each were measured.
        mask_ratio: of completions.
        seed: of the choice, and of the masks.
    """
    model, source = subjects["model"]
    left_out: dict[str, str] = {}
    images = _images(model, source, count, seed, _POOL)
    completions: list[PlannedFigure] = []
    psnr: list[float] = []
    if isinstance(model.net, MaskedAutoencoder):
        figure, psnr = _completions(model.net, images[:_COMPLETED], mask_ratio, seed)
        completions.append(figure)
    else:
        left_out["completions"] = "the model has no decoder"
    visuals: dict[str, Visuals] = {}
    for key in (key for key in _DRAWN if key in subjects):
        opened, source = subjects[key]
        grid = grid_size(opened.backbone.encoder)
        if grid is None:
            left_out[f"pictures of tokens and attention, {LABELS[key]}"] = "its patches lie on no grid"
            continue
        drawn = _images(opened, source, count, seed, _DRAWN_IMAGES)
        visuals[key], why_not = _visuals(opened.backbone, drawn, grid)
        if why_not:
            left_out[f"attention maps, {LABELS[key]}"] = why_not
    attention, tokens = [], []
    if visuals:
        attention.append(_foregrounds(visuals))
        tokens.append(_colours(visuals))
    if (own := visuals.get("model")) is not None:
        attention = [*_class_attention(own), *attention]
        if len(images) > 1:
            tokens.append(_neighbours(model.backbone, images, own))
        else:
            left_out["neighbours of tokens"] = "they are looked up in other images, but there is only one image"
    figures = {"model": completions, "attention": attention, "tokens": tokens}
    return Examples(figures=figures, mask_ratio=mask_ratio, psnr=psnr, left_out=left_out)


def draw_grid(rows: Tiles) -> Figure:
    """All tiles of a figure, on the width of the report."""
    columns = max(_FEWEST_COLUMNS, *(len(row) for row in rows))
    return draw_tiles([[*row, *[None] * (columns - len(row))] for row in rows], tile_width=_WIDTH / columns)


def _images(opened: Opened, source: ImageSource, count: int, seed: int, most: int) -> Float[Tensor, "b c hh ww"]:
    """Some of the images that are measured, as the network gets them; the same for every network."""
    measured = fixed_sample(len(source), count, seed)
    order = np.random.default_rng(seed).permutation(measured).tolist()  # else those of one class might come first
    return read_images(source, opened.backbone.transform(), order, most).images


def _completions(
    net: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], mask_ratio: float, seed: int
) -> tuple[PlannedFigure, list[float]]:
    """The figure of completed images, and the PSNR of their hidden patches."""
    masks = nested_masks(len(images), net.num_patches, mask_ratio, seed)
    completion = complete_in_batches(net, images, masks)
    psnr = completion_quality(completion, masks, net.config.patch_size).psnr.tolist()
    as_it_is = (0.0,) * net.config.in_chans, (1.0,) * net.config.in_chans  # mean and deviation
    pictures = zip(*(to_pictures(kind, *as_it_is) for kind in completion), strict=True)
    halves = [
        [*(Tile(picture) for picture in row[:3]), Tile(row[3], caption=f"{value:.1f} dB")]
        for row, value in zip(pictures, psnr, strict=True)
    ]
    rows = [list(chain(*halves[i : i + _SIDE_BY_SIDE])) for i in range(0, len(halves), _SIDE_BY_SIDE)]
    caption = (
        f"From left to right: an image, what the model saw of it ({100 * mask_ratio:g}% of the patches "
        "hidden), its prediction of the hidden patches, and the completed image. Compare the "
        "last with the first; the number is the PSNR of hidden patches, where more is better."
    )
    if net.config.norm_pix_loss:
        caption += " Brightness and contrast of each patch come from the original, since targets were normalised."
    titles = ["original", "masked", "prediction", "completed"] * min(_SIDE_BY_SIDE, len(halves))
    return PlannedFigure("completions", "Completions", caption, partial(draw_grid, titled(titles, rows))), psnr


def _visuals(backbone: Backbone, images: Float[Tensor, "b c hh ww"], grid: tuple[int, int]) -> tuple[Visuals, str]:
    """What a network makes of images, and why it shows no attention; "" if it does. A layer at a time saves memory."""
    encoder, attention, saliency, why_not = backbone.encoder, None, None, ""
    try:
        layers = [class_attention(encoder, images, layer=layer) for layer in range(len(layers_of(encoder)))]
        attention = class_attention(encoder, images, stride=_stride(images, grid))
        saliency = torch.stack([found.saliency for found in layers])
    except UserError as error:
        why_not = str(error)
    patches = encode_patches(encoder, images)
    visuals = Visuals(
        pictures=to_pictures(images, backbone.mean, backbone.std),
        attention=attention,
        saliency=saliency,
        principal=principal_mask(patches, grid),
        colours=token_colours(patches, grid).pictures,
        own_colours=token_colours(patches, grid, joint=False).pictures,
    )
    return visuals, why_not


def _stride(images: Float[Tensor, "b c hh ww"], grid: tuple[int, int]) -> int:
    """The coarsest stride whose maps have at least `_FINE` cells, of those that divide the patches."""
    shorter = min(images.shape[2:])
    patch = math.gcd(images.shape[2] // grid[0], images.shape[3] // grid[1])
    strides = [stride for stride in range(1, patch + 1) if patch % stride == 0]
    return max((stride for stride in strides if shorter // stride >= _FINE), default=1)


def _class_attention(visuals: Visuals) -> Iterable[PlannedFigure]:
    """What the class token attends to: in the last layer, head by head, and in all layers."""
    if visuals.attention is None or visuals.saliency is None:
        return
    fine, saliency = visuals.attention, visuals.saliency.cpu().numpy()
    yield PlannedFigure(
        "heads",
        "Attention of each head",
        "For each image, how much the class token attends to each place in the last encoder layer, for all heads "
        "together and for each head; each map is scaled to its maximum, and the number below is the maximum divided by "
        "the mean (1 is uniform attention). Heads with different subspaces should attend to different things; equal "
        "maps mean redundant heads.",
        partial(draw_grid, attention_tiles(visuals.pictures, fine.heads.cpu().numpy(), fine.saliency.cpu().numpy())),
    )
    layers = sorted(set(np.linspace(0, len(saliency) - 1, min(_MOST_LAYERS, len(saliency))).round().astype(int)))
    rows = [
        [Tile(picture), *(heat(saliency[layer, i]) for layer in layers)] for i, picture in enumerate(visuals.pictures)
    ]
    yield PlannedFigure(
        "saliency",
        "What the class token attends to, by layer",
        "The class token’s attention to patches, mean over heads, in layers of the encoder from the first to the last. "
        "Look for the first layer in which bright patches follow objects rather than positions; the number below each "
        "map is its maximum divided by its mean (1 is uniform attention).",
        partial(draw_grid, titled(["image", *(f"layer {layer}" for layer in layers)], rows)),
    )


def _foregrounds(visuals: dict[str, Visuals]) -> PlannedFigure:
    columns = []
    for key, found in visuals.items():
        kinds = [("by attention", mass_mask(found.saliency[-1]))] if found.saliency is not None else []
        for kind, masks in [*kinds, ("by component", found.principal)]:
            tiles = [cut_out(*pair) for pair in zip(found.pictures, masks.cpu().numpy(), strict=True)]
            columns.append((key, kind, tiles))
    return PlannedFigure(
        "foregrounds",
        "Foregrounds found without labels",
        "Blue covers the background: by attention, the foreground is the smallest set of patches with 60% of the class "
        "token’s attention in the last layer; by component, it is one side of the tokens’ first principal component. "
        "Random initialisation also gives a foreground: only the improvement over it was learned.",
        partial(draw_grid, _beside_images(visuals, columns)),
    )


def _colours(visuals: dict[str, Visuals]) -> PlannedFigure:
    columns = []
    for key, found in visuals.items():
        kinds = [("each by itself", found.own_colours)] if key == "model" else []
        for kind, pictures in [*kinds, ("all together", found.colours)]:
            columns.append((key, kind, [Tile(picture) for picture in pictures]))
    return PlannedFigure(
        "token_colours",
        "Tokens as colours",
        "Three principal components of the last encoder layer’s tokens as red, green and blue, one colour per patch. "
        "“Each by itself” computes components for each image; “all together” uses the same components for all images, "
        "so that colours are comparable, and similar patches should have similar colours.",
        partial(draw_grid, _beside_images(visuals, columns)),
    )


def _beside_images(visuals: dict[str, Visuals], columns: Sequence[tuple[str, str, Sequence[Tile]]]) -> Tiles:
    """A row for each image: the image, then a tile of each column, titled by its network and kind."""
    pictures = next(iter(visuals.values())).pictures
    titles = ["image", *("\n".join([*wrap(f"{LABELS[key]}:", _TITLE_WIDTH), kind]) for key, kind, _ in columns)]
    rows = [[Tile(picture), *(tiles[i] for _, _, tiles in columns)] for i, picture in enumerate(pictures)]
    return titled(titles, rows)


def _neighbours(backbone: Backbone, images: Float[Tensor, "b c hh ww"], visuals: Visuals) -> PlannedFigure:
    """Neighbours of the patch of each drawn image that its class token attends to most, or of the middle one."""
    patches = encode_patches(backbone.encoder, images)
    pictures = to_pictures(images, backbone.mean, backbone.std)
    gh, gw = visuals.principal.shape[1:]
    height, width = pictures.shape[1] / gh, pictures.shape[2] / gw
    tokens, framed = [gh // 2 * gw + gw // 2] * len(visuals.pictures), "in the middle of the image"
    if visuals.saliency is not None:
        tokens = visuals.saliency[-1].flatten(1).argmax(1).tolist()
        framed = "to which the class token attends most"

    def tile(image: int, token: int, caption: str) -> Tile:
        return Tile(pictures[image], caption=caption, box=(token % gw * width, token // gw * height, width, height))

    rows = []
    for image, token in enumerate(tokens):
        found = nearest_tokens(patches, image, token, _NEIGHBOURS)
        rows.append([tile(image, token, ""), *(tile(i, near, f"{cosine:.2f}") for i, near, cosine in found)])
    return PlannedFigure(
        "neighbours",
        "Nearest patches of other images",
        f"The left column frames the patch {framed}, the other columns the most similar "
        "patches of other images, at most one per image, with the cosines between tokens. If they have similar "
        "content, tokens encode content; if they are at the same place, tokens encode position.",
        partial(draw_grid, titled(["patch", *(f"neighbour {i + 1}" for i in range(len(rows[0]) - 1))], rows)),
    )
