"""How much information about an image is left after each layer: dead coordinates, ranks, pixels, linear probes."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.data import ImageSource, Part
from crate_mae.data.base import align_classes, aligned_labels, occurring_classes
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import LinearResult, Score, linear_probe, refuse_small_classes
from crate_mae.interpret.layer_measures import Forward, default_pass
from crate_mae.interpret.statistics import Row, Statistic, not_finite, place_of, row, rows_over_layers
from crate_mae.models.masking import patchify
from crate_mae.models.tracing import layers_of, taps_of, trace
from crate_mae.theory.measures import effective_rank

_RIDGE = 1e-4  # times the mean variance of the tokens' coordinates
_CHUNK = 16  # images whose tokens are held at once
_ROUNDING = 1e-5  # of mean tokens in float32, relative to the largest
PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1)  # C of a probe; on features of CIFAR-10 the best was inside in every trial


@torch.no_grad()
def dead_coordinates(model: nn.Module, batches: Sequence[Any], forward: Forward = default_pass) -> list[Row]:
    """The share of each code's coordinates that are zero for every token of every image; none without sparse codes."""
    names = [name for name, layer in layers_of(model).items() if "code" in taps_of(layer)]
    alive: dict[str, Tensor] = {}
    for batch in batches if names else []:
        for name, code in _at_point(model, names, "code", batch, forward).items():
            active = (code != 0).flatten(0, -2).any(0)
            alive[name] = alive.get(name, torch.zeros_like(active)) | active
    return [
        row(place_of(name), "dead_coordinates", Statistic(1 - float(found.float().mean()), None, 1), over="layer")
        for name, found in alive.items()
    ]


@torch.no_grad()
def feature_ranks(model: nn.Module, batches: Sequence[Any], forward: Forward = default_pass) -> list[Row]:
    """Effective rank of the images' features (mean tokens) after each layer, less their mean over images.

    A fall towards 1 is collapse: all images become one. It is at most the number of images, less one; and 1 for
    features that are equal up to rounding, which would have the rank of noise.
    """
    features: dict[str, list[Tensor]] = {name: [] for name in layers_of(model)}
    for batch in batches if features else []:
        for name, tokens in _at_point(model, features, "z_next", batch, forward).items():
            features[name].append(tokens.float().mean(1))
    rows = []
    for name, found in features.items():
        z = torch.cat(found)
        if not z.isfinite().all():  # of which LAPACK would complain
            raise not_finite(place_of(name), "feature_rank")
        differences = z - z.mean(0)
        are_equal = differences.abs().max() <= _ROUNDING * z.abs().max()
        rank = 1.0 if are_equal else float(effective_rank(differences))
        rows.append(row(place_of(name), "feature_rank", Statistic(rank, None, 1), point="z_next", over="layer"))
    return rows


@torch.no_grad()
def pixels_from_layers(encoder: nn.Module, images: Float[Tensor, "b c hh ww"], patch_size: int) -> list[Row]:
    """How much of a patch its own token retains in a linear way: R^2 of ridge regression, after each layer.

    The regression maps the tokens of whole images to their own pixels. Hidden patches would need tokens in their
    places, which an encoder that sees visible patches alone does not have, and would measure guessing rather than
    keeping. The maps are fitted on the first half of the images and judged on the second: 1 is everything, 0 no more
    than the mean patch, and less than 0 is worse than that. Sums are kept, not tokens.

    Raises:
        UserError: for fewer than two images, or tokens that are not finite.
    """
    if len(images) < 2:
        raise UserError("Reconstruction from layers needs at least 2 images: one to fit, one to judge.")
    names = list(layers_of(encoder))
    half = len(images) // 2
    sums: dict[str, Tensor] = {}
    for batch in images[:half].split(_CHUNK):
        for name, (x, y) in _tokens_and_pixels(encoder, names, batch, patch_size).items():
            joint = torch.cat([x, y, torch.ones_like(x[..., :1])], dim=-1).flatten(0, 1)
            sums[name] = sums.get(name, 0) + joint.mT @ joint
    q = patch_size**2 * images.shape[1]
    maps = {name: _ridge(found, q, place_of(name)) for name, found in sums.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in images[half:].split(_CHUNK):
        for name, (x, y) in _tokens_and_pixels(encoder, names, batch, patch_size).items():
            weight, x_mean, y_mean = maps[name]
            error = (y - y_mean - (x - x_mean) @ weight).square().sum((1, 2))
            total = (y - y_mean).square().sum((1, 2))
            scores[name].append(torch.stack([error, total], 1))
    scored = {}
    for name, found in scores.items():
        error, total = torch.cat(found).unbind(1)
        # Divided by the mean image's variance: their mean is the usual R^2, and flat images do not outweigh all others.
        scored[place_of(name)] = 1 - error / total.mean().clamp_min(1e-12)
    return rows_over_layers(scored, "pixel_r2", "z_next")


ProbeImages = tuple[Part, Part]  # labelled images to fit on and to measure on, with one numbering of classes


def probe_images(train: ImageSource, val: ImageSource, most: int, seed: int) -> ProbeImages:
    """Choose at most `most` labelled images of each source, and number their classes alike.

    Raises:
        UserError: without labels, with one class, with a class that only the images to measure on have, or with a
            class of a single training image.
    """
    return _numbered_alike(*(_labelled(source, most, seed) for source in (train, val)))


def split_probe_images(source: ImageSource, most: int, seed: int) -> ProbeImages:
    """Choose at most `most` labelled images of one source: a pseudo-random half to fit on, the other to measure on.

    Raises:
        UserError: without labels, with one class, or with a class of fewer than two images to fit on.
    """
    chosen = _labelled(source, most, seed)
    order = np.random.default_rng(seed).permutation(len(chosen))
    halves = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    train, val = (Part(chosen, half) for half in halves)
    if unknown := set(occurring_classes(val)) - set(occurring_classes(train)):
        raise UserError(f"Class {min(unknown)} of {source.name} has too few images for a probe.")
    return _numbered_alike(train, val)


def probe_layers(
    backbone: Backbone,
    train: ImageSource,
    val: ImageSource,
    *,
    layers: Sequence[int] | str = "all",
    grid: Sequence[float] = PROBE_STRENGTHS,
) -> dict[int, LinearResult]:
    """A linear probe of each layer, by its number.

    Args:
        backbone: the frozen network.
        train: labelled images to fit on.
        val: labelled images to measure on.
        layers: numbers of layers, or "all".
        grid: strengths of regularisation, see `evaluation.probes.linear_probe`.
    """
    device = next(backbone.encoder.parameters()).device
    try:
        parts = [extract(backbone, source, Extraction(layers=layers, cache=False)) for source in (train, val)]
    finally:
        backbone.encoder.to(device)  # extraction takes it to an accelerator, away from its decoder
    probes = {}
    for fitted, judged in zip(*parts, strict=True):
        assert fitted.labels is not None and judged.labels is not None, "images of probes have labels"
        probes[fitted.layer] = linear_probe(fitted.values, fitted.labels, judged.values, judged.labels, grid=grid)
    return probes


def last_layer_score(backbone: Backbone, images: ProbeImages) -> Score:
    """Accuracy of a linear classifier on the last layer of the encoder."""
    (probe,) = probe_layers(backbone, *images, layers=(-1,)).values()
    return probe.top1


def probe_rows(backbone: Backbone, images: ProbeImages) -> tuple[list[Row], bool]:
    """Accuracy of a linear classifier on each layer of the encoder, and whether every fit converged."""
    probes = probe_layers(backbone, *images)
    n = len(images[1])
    rows = []
    for layer, probe in probes.items():
        share = probe.top1.value
        spread = math.sqrt(share * (1 - share) * n / (n - 1)) if n > 1 else None  # of rights and wrongs, 1 and 0
        rows.append(Row("encoder", layer, "probe_accuracy", "", share, spread, n, "images"))
    return rows, all(probe.converged for probe in probes.values())


def _at_point(model: nn.Module, names: Collection[str], point: str, batch: Any, forward: Forward) -> dict[str, Tensor]:
    """The tokens, or codes, of each layer at a point, from one pass."""
    with trace(model, [f"{name}.{point}" for name in names]) as record:
        forward(model, batch)
    return {name: record[f"{name}.{point}"][0] for name in names}


def _tokens_and_pixels(
    encoder: nn.Module, names: list[str], images: Tensor, patch_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer the patches' tokens, and the pixels of the same patches, in float64."""
    images = images.to(next(encoder.parameters()).device)
    y = patchify(images.double(), patch_size)
    found = _at_point(encoder, names, "z_next", images, default_pass)
    return {name: (tokens.double()[:, -y.shape[1] :], y) for name, tokens in found.items()}


def _ridge(sums: Float[Tensor, "s s"], q: int, place: tuple[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The map from tokens to pixels, and the means of both, from the second moments of (token, pixels, 1)."""
    moments = sums / sums[-1, -1]
    mean = moments[-1, :-1]
    covariance = moments[:-1, :-1] - mean.outer(mean)
    d = len(mean) - q
    variance = covariance[:d, :d]
    if not sums.isfinite().all():
        raise not_finite(place, "pixel_r2")
    strength = (_RIDGE * variance.trace() / d).clamp_min(1e-12)
    eye = torch.eye(d, dtype=variance.dtype, device=variance.device)
    return torch.linalg.solve(variance + strength * eye, covariance[:d, d:]), mean[:d], mean[d:]


def _labelled(source: ImageSource, most: int, seed: int) -> Part:
    """A pseudo-random choice of the images that have a label."""
    labels = source.labels
    known = np.flatnonzero(labels >= 0) if labels is not None else np.zeros(0, dtype=np.int64)
    if labels is None or not len(known):
        raise UserError(f"{source.name} has no labels, and a linear probe needs them.")
    if len(known) > most:
        known = np.sort(np.random.default_rng(seed).choice(known, most, replace=False))
    return Part(source, known)


def _numbered_alike(train: Part, val: Part) -> ProbeImages:
    """The same images, with labels that are numbers of the training images' classes."""
    classes = align_classes(train, val)
    labels = [aligned_labels(part, classes) for part in (train, val)]
    refuse_small_classes(labels[0], 2, classes)
    parts = zip((train, val), labels, strict=True)
    train, val = (Part(part, np.arange(len(part)), labels=found, classes=classes) for part, found in parts)
    return train, val
