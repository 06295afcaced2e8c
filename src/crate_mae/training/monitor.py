"""What can be known about a model without labels while it learns, on images that it never trains on."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crate_mae.data import save_picture_grid
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.completion import complete
from crate_mae.models.masking import random_mask
from crate_mae.models.tracing import trace
from crate_mae.theory.coding_rate import official_subspace_coding_rate
from crate_mae.theory.measures import effective_rank, zero_fraction

_SPARSE_CODES = "encoder.blocks.*.ista"
_PROJECTIONS = "encoder.blocks.*.attn.subspaces"
_MASK_SEED = 0  # the same masks in every run, so that runs can be compared
_BATCH = 32
_PICTURED = 8


class LayerSignal(NamedTuple):
    """One measure of one layer; `layer` counts from 0."""

    part: str
    layer: int
    measure: str
    value: float


class Signals(NamedTuple):
    """What `Monitor.measure` finds.

    Attributes:
        held_out_loss: the training loss, on held-out images with fixed masks.
        feature_rank: effective rank of the images' features (the mean over patches of the unmasked encoder's output),
            less their mean over images. A fall towards 1 is collapse.
        layers: of every encoder layer that has them: `zero_fraction`, the share of exact zeros in the sparse code, and
            `subspace_rate`, the coding rate of the projections, mean over images, as the official code takes it.
    """

    held_out_loss: float
    feature_rank: float
    layers: list[LayerSignal]


class Monitor:
    """Measures a model on fixed held-out images with fixed masks: nothing random, nothing remembered.

    Args:
        images: normalised held-out images.
        num_patches: patches per image.
        mask_ratio: share of hidden patches.
    """

    def __init__(self, images: Float[Tensor, "b c hh ww"], num_patches: int, mask_ratio: float) -> None:
        self.images = images
        generator = torch.Generator().manual_seed(_MASK_SEED)
        self.masks: Bool[Tensor, "b n"] = random_mask(len(images), num_patches, mask_ratio, generator)

    def measure(self, model: MaskedAutoencoder) -> Signals:
        """All signals, in float32."""
        names = [name for name, _ in model.named_modules()]
        patterns = [pattern for pattern in (_SPARSE_CODES, _PROJECTIONS) if fnmatch.filter(names, pattern)]
        device = model.mask_token.device
        loss, features = 0.0, []
        sums: dict[tuple[str, str], float] = defaultdict(float)
        with evaluating(model):
            for images, masks in zip(self.images.split(_BATCH), self.masks.split(_BATCH), strict=True):
                images = images.to(device)
                share = len(images) / len(self.images)
                loss += share * float(model(images, mask=masks).loss)
                with trace(model, patterns) as record:
                    tokens = model.encoder.forward_features(images)
                features.append(tokens[:, model.encoder.num_prefix_tokens :].mean(dim=1))
                for name, (output,) in record.items():
                    for measure, value in _layer_measure(name, output, model.config.num_heads):
                        sums[name, measure] += share * value
        layers = [LayerSignal(*_place(name), measure, value) for (name, measure), value in sums.items()]
        z = torch.cat(features)
        return Signals(loss, float(effective_rank(z - z.mean(dim=0))), layers)

    def picture(self, model: MaskedAutoencoder, path: Path) -> None:
        """Write held-out images as they are, masked, completed, and with the completion pasted into the holes."""
        device = model.mask_token.device
        images, masks = self.images[:_PICTURED].to(device), self.masks[:_PICTURED]
        with evaluating(model):
            completion = complete(model, images, masks)
        save_picture_grid([(name, pictures.cpu()) for name, pictures in completion._asdict().items()], path)


def _layer_measure(name: str, output: Tensor, num_heads: int) -> Iterator[tuple[str, float]]:
    if fnmatch.fnmatch(name, _SPARSE_CODES):
        yield "zero_fraction", float(zero_fraction(output))
    else:
        projections = output.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        yield "subspace_rate", float(official_subspace_coding_rate(projections).mean())


def _place(name: str) -> tuple[str, int]:
    """("encoder", 3) of "encoder.blocks.3.ista"."""
    part, _, layer, *_ = name.split(".")
    return part, int(layer)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, stochastic depth or compiled code, which would be compiled once more for evaluation."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
