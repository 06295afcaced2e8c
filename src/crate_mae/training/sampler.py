"""Which images each step sees: a function of (seed, step), the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from crate_mae.training.randomness import Purpose, derive_seed


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which an epoch goes through the images: a permutation that depends on (seed, epoch) only."""
    return np.random.default_rng(derive_seed(seed, Purpose.ORDER, epoch)).permutation(num_images)


def micro_slices(global_batch: int, rank: int, world_size: int, accumulation: int) -> list[slice]:
    """The parts of a global batch that one process works through, one slice per micro-batch.

    Processes take consecutive shares, and each share is cut into consecutive micro-batches of equal size, which is what
    makes the mean of the micro-batches' losses the loss of the global batch.
    """
    micro = global_batch // (world_size * accumulation)
    assert micro * world_size * accumulation == global_batch, "the configuration is checked for this"
    first = rank * accumulation
    return [slice(i * micro, (i + 1) * micro) for i in range(first, first + accumulation)]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process from `start_step` to the end of the run, as lists of (image, epoch) keys.

    Pass it to a `DataLoader` as `batch_sampler`. It has no state but the step, so a resumed run goes on with exactly
    the images that come next; and it never ends at an epoch, so loading never stalls between two. The last images of an
    epoch that fill no batch are left out; another permutation leaves out others.

    Args:
        num_images: images to train on.
        batch_size: global batch: images per step over all processes and micro-batches.
        seed: the run's seed.
        start_step: first step to yield.
        total_steps: the step before which to stop.
        rank: number of this process.
        world_size: number of processes.
        accumulation: micro-batches per step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        self.slices = micro_slices(batch_size, rank, world_size, accumulation)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_images), epoch
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            for part in self.slices:
                yield [(int(index), epoch) for index in batch[part]]
