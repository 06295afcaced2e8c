"""Measure every layer of one model on one source of images: the rows of a report, and its audit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from crate_mae.data import BadImage, open_source
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.data.numbers import check_whole
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone, is_pixels, open_backbone
from crate_mae.evaluation.reconstruction import nested_masks, read_sample
from crate_mae.interpret.audit import EXPAND_REDUCTION_LAYER, UNTRAINED_DRAWS, AuditRow, Tokens, audit
from crate_mae.interpret.information import dead_coordinates, feature_ranks, pixels_from_layers
from crate_mae.interpret.layer_measures import (
    EPS,
    SPARSITY_WEIGHT,
    STAND_IN,
    SUBSPACES,
    default_pass,
    layer_measures,
    missing,
    stream,
)
from crate_mae.interpret.statistics import Row, place_of
from crate_mae.interpret.steps import measure_claims
from crate_mae.interpret.weights import inverse_measures, layer_pairs, measure_inverse_weights, measure_weights
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.classifier import untrained
from crate_mae.models.config import MASK_RATIO, config_of
from crate_mae.models.features import evaluating
from crate_mae.models.tracing import layers_of
from crate_mae.models.weights import UNTRAINED, is_untrained, load, unwrapped

Progress = Callable[[str], object]


class Opened(NamedTuple):
    """A model that can be measured.

    Attributes:
        name: the name that the user gave it.
        net: what is traced: an autoencoder with its decoder, else an encoder.
        backbone: its encoder, and how images are prepared for it.
    """

    name: str
    net: nn.Module
    backbone: Backbone


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured.

    Attributes:
        model: the name that the user gave it.
        data: name of the source.
        images: number of images.
        mask_ratio: share of hidden patches; None if none were hidden.
        seed: of the choice of images, of the masks, and of random initialisation.
        eps: distortion of the exact rates.
        sparsity_weight: lambda of the objective.
        rows: every measure of every layer.
        audit: whether the layers do what they were derived to do; empty if that was not asked for.
        left_out: measures that this model does not have, and why.
        bad: images that could not be read and are left out.
    """

    model: str
    data: str
    images: int
    mask_ratio: float | None
    seed: int
    eps: float
    sparsity_weight: float
    rows: list[Row]
    audit: list[AuditRow]
    left_out: dict[str, str]
    bad: list[BadImage]


def measure_layers(
    model: Any,
    source: Any,
    *,
    count: int = 256,
    mask_ratio: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    audited: bool = True,
    untrained: int = UNTRAINED_DRAWS,
    training_mask_ratio: float = MASK_RATIO,
    on_stage: Progress = lambda _stage: None,
) -> Measurements:
    """Measure every layer of a model on images.

    The pixels that tokens retain are measured on whole images, everything else on masked ones if there is a
    `mask_ratio`. Measures that a model or a single image does not have are left out, with the reason.

    Args:
        model: any form of MODEL, `timm:NAME` of a Vision Transformer, a module from Python, or a result of
            `open_measurable`.
        source: any form of DATA.
        count: largest number of images; of more, a fixed pseudo-random choice is taken.
        mask_ratio: share of patches to hide; None hides none. Only an autoencoder of this library can hide any.
        seed: of that choice, of the masks, and of random initialisation.
        batch_size: images that go through the model at once.
        audited: whether to judge each step against its controls, see `interpret.audit`.
        untrained: number of random initialisations of the network among these controls, if its configuration is known.
        training_mask_ratio: share of patches that was hidden in training, for the audit of an encoder that sees
            visible patches alone.
        on_stage: called with the name of each stage.

    Raises:
        UserError: for a mistake in the options, the model or the data, or weights that are not finite.
    """
    check_whole("--count", count)
    check_whole("batch_size", batch_size)
    images_from = open_source(source)
    opened = model if isinstance(model, Opened) else open_measurable(model, seed)
    read = read_sample(images_from, opened.backbone.transform(), count, seed)
    masks = None
    if mask_ratio is not None:
        if not isinstance(opened.net, MaskedAutoencoder):
            raise UserError(f"{opened.name} cannot hide patches: leave mask_ratio out.")
        masks = nested_masks(len(read.images), opened.net.num_patches, mask_ratio, seed)
    rows, left_out = _measure(opened, read.images, _batches(read.images, masks, batch_size), on_stage)
    judged: list[AuditRow] = []
    if audited:
        on_stage("audit")
        views = token_views(opened.net, read.images, masks, training_mask_ratio, seed, batch_size)
        judged = _audit(opened, views, seed, untrained)
        if not judged:
            left_out["audit"] = "no layer has attention in subspaces, or sparse codes"
    return Measurements(
        model=opened.name,
        data=images_from.name,
        images=len(read.images),
        mask_ratio=mask_ratio,
        seed=seed,
        eps=EPS,
        sparsity_weight=SPARSITY_WEIGHT,
        rows=rows + _pooled_rows(judged),
        audit=judged,
        left_out=left_out,
        bad=read.bad,
    )


def open_measurable(model: Any, seed: int) -> Opened:
    """Open a model whose layers can be measured.

    Args:
        model: see `measure_layers`.
        seed: of random initialisation.

    Raises:
        UserError: if there is no such model, or it is not a Vision Transformer.
    """
    model = unwrapped(model)
    name = str(model) if isinstance(model, (str, Path)) else ""
    if name and not name.startswith("timm:") and not is_pixels(name):
        with default_generator_seeded(seed):
            model = load(model)
    backbone = open_backbone(model, seed=seed)
    name, is_random = name or backbone.name, is_untrained(name)
    net = model if isinstance(model, MaskedAutoencoder) else backbone.encoder
    if not _is_transformer(backbone.encoder, layers_of(net)):
        raise UserError(f"{name} is not a Vision Transformer, and only layers of those can be measured.")
    return Opened(name, net, replace(backbone, is_random=backbone.is_random or is_random))


def untrained_twin(model: Opened, seed: int) -> Opened | None:
    """The same network with random initialisation; None if it came from Python and its configuration is not known."""
    described = model.backbone.architecture
    if described is None:
        return None
    if described.startswith("timm:"):
        return open_measurable(f"{described}{UNTRAINED}", seed)
    opened = open_measurable(untrained(config_of(json.loads(described)), seed), seed)
    return Opened(model.name, opened.net, replace(opened.backbone, is_random=True))


def _is_transformer(encoder: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether each part has one list of layers of tokens: convolutions have none, and Swin has one for each stage."""
    places = {place_of(name) for name in layers}
    return bool(layers) and len(places) == len(layers) and hasattr(encoder, "num_prefix_tokens")


def _measure(
    opened: Opened, images: Tensor, batches: list[Any], on_stage: Progress
) -> tuple[list[Row], dict[str, str]]:
    """All rows, and what is left out."""
    net = opened.net
    left_out: dict[str, str] = {}
    with evaluating(net):
        on_stage("weights")
        rows = measure_weights(net)
        if not any(row.measure == "dictionary_coherence" for row in rows):
            left_out["dictionaries"] = "no layer has any"
        on_stage("rates, sparsity, ranks")
        rows += stream(net, batches, layer_measures(), forward=masked_pass)
        left_out |= _why_not(net)
        on_stage("inverses")
        if layer_pairs(net):
            rows += measure_inverse_weights(net)
            rows += stream(net, batches, inverse_measures(net), forward=masked_pass)
        else:
            left_out["inverses"] = "there is no decoder of as many layers, of the same width"
        on_stage("information")
        rows += _information(opened, images, batches, left_out)
    return rows, left_out


def _why_not(net: nn.Module) -> dict[str, str]:
    """Reasons for measures that no layer has; a stand-in is not missing where there are subspaces."""
    names = missing(net, layer_measures())
    reasons = dict.fromkeys(names, "no layer has what it is measured on")
    if SUBSPACES not in names:
        reasons.pop(STAND_IN, None)
    elif STAND_IN not in names:
        reasons[SUBSPACES] = "no layer has subspaces; value projections stand in for them, in the official form alone"
    return reasons


def token_views(
    net: nn.Module, images: Tensor, masks: Tensor | None, mask_ratio: float, seed: int, batch_size: int
) -> dict[Tokens, list[Any]]:
    """The batches of the audit: all tokens and, if the encoder is trained on visible patches alone, those."""
    if not isinstance(net, MaskedAutoencoder) or net.config.mask_tokens == "encoder":
        return {"all": _batches(images, masks, batch_size)}
    hidden = masks if masks is not None else nested_masks(len(images), net.num_patches, mask_ratio, seed)
    return {"all": _batches(images, None, batch_size), "visible": _batches(images, hidden, batch_size)}


def _audit(model: Opened, views: dict[Tokens, list[Any]], seed: int, untrained: int) -> list[AuditRow]:
    """Every claim of the network on these views, next to random initialisations of it."""
    with evaluating(model.net):
        found = measure_claims(model.net, views, masked_pass, seed=seed)
    draws = []
    for draw in range(untrained if found else 0):
        twin = untrained_twin(model, seed + 1 + draw)
        if twin is not None:
            twin.net.to(next(model.net.parameters()).device)
            with evaluating(twin.net):
                draws.append(measure_claims(twin.net, views, masked_pass, seed=seed, quick=True))
    return audit(found, draws)


def _pooled_rows(judged: list[AuditRow]) -> list[Row]:
    """R - R^c of all images' tokens at the output of each layer, as the audit measured it on all tokens."""
    return [
        Row(found.part, found.layer, "pooled_rate_reduction", "z_next", found.after, None, 1, "layer")
        for found in judged
        if (found.claim, found.tokens) == (EXPAND_REDUCTION_LAYER, "all")
    ]


def _information(opened: Opened, images: Tensor, batches: list[Any], left_out: dict[str, str]) -> list[Row]:
    dead = dead_coordinates(opened.net, batches, masked_pass)
    if not dead:
        left_out["dead coordinates"] = "no layer has sparse codes"
    if len(images) < 2:
        left_out["feature rank and pixels from layers"] = "they need at least 2 images"
        return dead
    rows = dead + feature_ranks(opened.net, batches, masked_pass)
    encoder: Any = opened.backbone.encoder
    patch_embed: Any = getattr(encoder, "patch_embed", None)
    size = getattr(patch_embed, "patch_size", None)
    if size is None or size[0] != size[1]:
        left_out["pixels from layers"] = "the patches are not square"
        return rows
    fitted, d = len(images) // 2 * patch_embed.num_patches, encoder.num_features
    if fitted < d:
        left_out["pixels from layers"] = (
            f"{fitted} patches of half of the images are too few to fit a map of {d} dimensions"
        )
        return rows
    return rows + pixels_from_layers(encoder, images, int(size[0]))


def _batches(images: Tensor, masks: Tensor | None, batch_size: int) -> list[Any]:
    """Pairs of images and their masks, or of images and None."""
    parts = images.split(batch_size)
    return list(zip(parts, [None] * len(parts) if masks is None else masks.split(batch_size), strict=True))


def masked_pass(net: nn.Module, batch: tuple[Tensor, Tensor | None]) -> object:
    """A pass of the network on images and their masks, if they have any."""
    images, mask = batch
    images = images.to(next(net.parameters()).device)
    return default_pass(net, images) if mask is None else net(images, mask=mask)
