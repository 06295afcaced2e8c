"""The memory of a training step, foretold: the whole model goes forward and backward on shapes without numbers.

What lives at the worst moment is more than what the forward pass saves: the first gradients of activations are there
while nothing has been freed yet. So every tensor is followed (`live`), for any size of model in a few seconds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crate_mae.costs.live import LiveTensors
from crate_mae.costs.trial import StepSettings
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import random_mask
from crate_mae.models.monotone import retract_
from crate_mae.training.precision import autocast

# Resident memory of a step of the smallest model above that of its tensors: kernels that oneDNN compiles, and pages of
# libraries that are first touched. Measured (docs/planning.md).
LIBRARY_BYTES = {"float32": 30_000_000, "bfloat16": 50_000_000}

# What the C library's heap takes for the tensors that come and go in a step, by what they hold: between them it leaves
# holes too small for the next. Measured: 1.3 to 1.5 for most models (benchmarks/memory.py, docs/planning.md).
HEAP = 4 / 3

_MOST_IMAGES = 32  # that are followed; memory grows by the same amount with every image, and is continued from there
_CPU = torch.device("cpu")


class StepMemory(NamedTuple):
    """Bytes of one process in training.

    Attributes:
        saved: what the forward pass leaves for the backward pass, the images included.
        tensors: all tensors at the worst moment: weights, moments of AdamW, gradients so far, activations, and
            temporaries.
        resident: what a process on Linux has at that moment above what it had after its imports.
    """

    saved: int
    tensors: int
    resident: int


def foretell_memory(config: ModelConfig, settings: StepSettings) -> StepMemory:
    """The memory of a step as `costs.trial.TrialStep` takes it, on a CPU."""
    most = settings.batch_size
    if most <= _MOST_IMAGES:
        saved, standing, tensors = _followed(config, settings)
    else:
        half, whole = (_followed(config, settings.replace(batch_size=n)) for n in (_MOST_IMAGES // 2, _MOST_IMAGES))
        share = most / _MOST_IMAGES
        saved, standing, tensors = (round(b + (2 * share - 2) * (b - a)) for a, b in zip(half, whole, strict=True))
    resident = standing + HEAP * (tensors - standing) + LIBRARY_BYTES[settings.precision]
    return StepMemory(saved, tensors, round(resident))


def build_without_memory(config: ModelConfig) -> MaskedAutoencoder:
    """The model with shapes and no numbers, on PyTorch's device "meta"; no random number is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build(config)


def _followed(config: ModelConfig, settings: StepSettings) -> tuple[int, int, int]:
    """What is saved, what stays from step to step, and what lives at the peak."""
    without_memory = build_without_memory(config).train()
    mask = random_mask(settings.batch_size, without_memory.num_patches, settings.mask_ratio, torch.Generator())
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
        model = without_memory.to_empty(device=_CPU)
        retract_(model)  # as training does from its start, so that no pass draws its subspaces back by itself
        images = torch.empty(settings.batch_size, config.in_chans, *config.image_size)
        saved, standing = two_steps(model, images, mask, settings.precision, live)
    return saved, standing, live.peak


def two_steps(
    model: MaskedAutoencoder, images: Tensor, mask: Tensor, precision: str, live: LiveTensors
) -> tuple[int, int]:
    """Have `live` follow a first step and a second, in which AdamW has its moments.

    Returns:
        bytes that the second step's forward pass saves, and bytes that were there before it.
    """
    moments: list[Tensor] = []
    saved = before = 0
    for _ in range(2):
        before = live.now
        with autocast(_CPU, precision):
            loss = model(images, mask=mask).loss
        saved = live.now - before
        loss.backward()
        if not moments:
            moments = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
        model.zero_grad()
    return saved, before
