"""What is looked at rather than measured: completions, attention, foregrounds, tokens as colours, and neighbours."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crate_mae.data.facts import fixed_sample
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.completion_quality import completion_quality
from crate_mae.evaluation.reconstruction import complete_in_batches, nested_masks, read_images
from crate_mae.interpret.attention_maps import mass_mask, principal_mask
from crate_mae.interpret.measure import Opened
from crate_mae.interpret.pictures.attention import ClassAttention, class_attention
from crate_mae.interpret.pictures.inputs import encode_patches, shown_images
from crate_mae.interpret.report.subjects import Subject
from crate_mae.interpret.tokens import Neighbours, nearest_tokens, token_colours
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.tracing import layers_of

DEFAULT_MASK_RATIO = 0.75  # of completions, if nobody knows that of the training
_LOOKED_AT = ("model", "random", "baseline")
_SHOWN = 4
_COMPLETED = 8
_POOL = 64  # images among which neighbours are looked for
_NEIGHBOURS = 5
_FINE = 28  # cells along the shorter side of a map; fewer where there are fewer pixels


class Completed(NamedTuple):
    """Completions of the images that are shown.

    Attributes:
        pictures: original, masked, completed, pasted, in [0, 1].
        psnr: of the hidden patches of each, in decibels.
        mask_ratio: share of patches that was hidden.
        own_statistics: whether brightness and contrast of each patch come from the original.
    """

    pictures: list[Float[np.ndarray, "b hh ww 3"]]
    psnr: list[float]
    mask_ratio: float
    own_statistics: bool


class Attention(NamedTuple):
    """What class tokens look at.

    Attributes:
        fine: of the last layer, on a grid finer than that of the patches.
        saliency: of every layer, mean over heads, on the grid of the patches.
        mass: foreground by the last layer's saliency.
    """

    fine: ClassAttention
    saliency: Float[Tensor, "l b gh gw"]
    mass: Bool[Tensor, "b gh gw"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one network makes of the images that are shown.

    Attributes:
        pictures: the images as it gets them, in [0, 1].
        attention: None for a network without a class token, or whose attention cannot be traced.
        principal: foreground by the first principal component of the last layer's tokens.
        colours: three principal components of these tokens, over all images that are shown.
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
    """Everything that is looked at.

    Attributes:
        completed: None for a model without a decoder.
        looks: of the model and of the other networks, by their keys.
        pool: pictures in [0, 1] among which neighbours were looked for.
        matches: of a patch of each image that is shown.
        left_out: what is not there, and why.
    """

    completed: Completed | None
    looks: dict[str, Look]
    pool: Float[np.ndarray, "k hh ww 3"]
    matches: list[Match]
    left_out: dict[str, str]


def collect_examples(subjects: dict[str, Subject], *, count: int, mask_ratio: float, seed: int) -> Examples:
    """Look at a few of the measured images, chosen by the seed and by nobody.

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
    looks = {}
    for key, subject in subjects.items():
        if key not in _LOOKED_AT:
            continue
        if grid_size(subject.opened.backbone.encoder) is None:
            left_out[f"pictures of tokens and attention, {subject.label}"] = "its patches lie on no grid"
            continue
        attention, why_not = _attention(subject.opened.backbone.encoder, shown := _images(subject, count, seed, _SHOWN))
        if attention is None:
            left_out[f"attention maps, {subject.label}"] = why_not
        looks[key] = _look(subject.opened.backbone, shown, attention)
    matches = _matches(model.opened, images, looks.get("model"))
    if not matches and "model" in looks:
        left_out["neighbours of tokens"] = "they are looked for in other images, and there is only one"
    pool = _pictures(model.opened.backbone, images)
    return Examples(completed=completed, looks=looks, pool=pool, matches=matches, left_out=left_out)


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


def _look(backbone: Backbone, images: Float[Tensor, "b c hh ww"], attention: Attention | None) -> Look:
    grid = grid_size(backbone.encoder)
    assert grid is not None, "whoever asks has seen to it"
    patches = encode_patches(backbone.encoder, images)
    return Look(
        pictures=_pictures(backbone, images),
        attention=attention,
        principal=principal_mask(patches, grid),
        colours=token_colours(patches, grid).pictures,
        own_colours=token_colours(patches, grid, joint=False).pictures,
    )


def _attention(encoder: nn.Module, images: Float[Tensor, "b c hh ww"]) -> tuple[Attention | None, str]:
    """What the class token looks at, or why nobody can tell. One layer at a time: all at once may not fit."""
    try:
        layers = [class_attention(encoder, images, layer=layer) for layer in range(len(layers_of(encoder)))]
        fine = class_attention(encoder, images, stride=_stride(encoder, images))
    except UserError as error:
        return None, str(error)
    saliency = torch.stack([found.saliency for found in layers])
    return Attention(fine, saliency, mass_mask(saliency[-1])), ""


def _stride(encoder: nn.Module, images: Float[Tensor, "b c hh ww"]) -> int:
    """The coarsest stride with maps that are fine enough to look at, of those that divide the patches."""
    grid = grid_size(encoder)
    assert grid is not None, "whoever asks has seen to it"
    shorter = min(images.shape[2:])
    patch = math.gcd(images.shape[2] // grid[0], images.shape[3] // grid[1])
    strides = [stride for stride in range(1, patch + 1) if patch % stride == 0]
    return max((stride for stride in strides if shorter // stride >= _FINE), default=1)


def _matches(model: Opened, images: Float[Tensor, "b c hh ww"], look: Look | None) -> list[Match]:
    """Neighbours of the patch of each shown image that its class token looks at most, or of the one in the middle."""
    encoder = model.backbone.encoder
    if len(images) < 2 or look is None:
        return []
    patches = encode_patches(encoder, images)
    shown = min(_SHOWN, len(images))
    gh, gw = look.principal.shape[1:]
    tokens = [gh // 2 * gw + gw // 2] * shown
    if look.attention is not None:
        tokens = look.attention.saliency[-1].flatten(1).argmax(1).tolist()
    return [
        Match(image=i, token=token, neighbours=nearest_tokens(patches, i, token, _NEIGHBOURS))
        for i, token in enumerate(tokens)
    ]


def _pictures(backbone: Backbone, images: Float[Tensor, "b c hh ww"]) -> Float[np.ndarray, "b hh ww 3"]:
    return shown_images(images, backbone.mean, backbone.std)
