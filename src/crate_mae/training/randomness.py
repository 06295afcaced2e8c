"""Every random number of a run as a function of (seed, purpose, step): what makes resuming exact."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Purpose(IntEnum):
    """What random numbers are for. Each purpose has its own stream, independent of the others."""

    WEIGHTS = 0
    ORDER = 1
    MASK = 2
    STEP = 3
    LABELS = 4
    MIX = 5


def derive_seed(seed: int, purpose: Purpose, *position: int) -> int:
    """A seed of 63 bits for one purpose at one position, such as a step or (step, rank).

    Mixed by `numpy.random.SeedSequence`, so that neighbouring seeds and positions give unrelated streams.
    """
    mixed = np.random.SeedSequence([seed, purpose, *position]).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def step_noise(seed: int, step: int, global_batch: int, num_patches: int) -> Float[Tensor, "b n"]:
    """Noise that decides which patches one step hides, for the images of all processes together, on the CPU.

    Every process draws the whole noise and takes its share, so that two processes hide what one process would hide.
    Sorting it (`masking.visible_from_noise`), which is most of the work, each process does for its own share alone.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, Purpose.MASK, step))
    return torch.rand(global_batch, num_patches, generator=generator)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step, for what draws from them inside the model (stochastic depth)."""
    torch.manual_seed(derive_seed(seed, Purpose.STEP, step, rank))
