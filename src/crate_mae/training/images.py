"""The images of a run: which are trained on, which are held out, and how both reach the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from crate_mae.data import (
    BadImage,
    Batch,
    ImageDataset,
    ImageSource,
    Part,
    UnreadableImage,
    collate,
    full_name,
    open_source,
)
from crate_mae.data.base import refuse_unreadable
from crate_mae.data.dataset import workers_errors_plain
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import ignore_stop_requests
from crate_mae.training.sampler import StepSampler

MOST_HELD_OUT = 512
PYTHON_OBJECT = "python:"


@dataclass(frozen=True)
class RunImages:
    """Two sources without a common image.

    Attributes:
        train: trained on.
        held_out: measured on.
        train_name: how the configuration names the data that the first comes from,
        held_out_name: and the second; None if the held-out images were taken out of the training images.
    """

    train: ImageSource
    held_out: ImageSource
    train_name: str
    held_out_name: str | None


def open_named(data: Any) -> tuple[ImageSource, str]:
    """Open data, and say how a configuration names it: so that a run can be resumed from any folder.

    Raises:
        UserError: if there is no such data, or the data of a run from Python is opened by its name.
    """
    if not isinstance(data, (str, Path)):
        source = open_source(data)
        return source, PYTHON_OBJECT + source.name
    if isinstance(data, str) and data.startswith(PYTHON_OBJECT):
        raise UserError(
            f"This run trains on a Python object ({data.removeprefix(PYTHON_OBJECT)}), which has no path.\n"
            "Resume it from Python with the same call as before: crate_mae.pretrain(your_dataset, out=...) or the like."
        )
    name = full_name(data)
    return open_source(name), name


def open_images(data: Any, val: Any = None) -> RunImages:
    """Open training and held-out images.

    Without `val`, max(1, min(512, n // 20)) of the n images are held out: always the same ones, whatever the seed, so
    that runs can be compared. Of a larger `val`, 512 images are taken in the same way.

    Raises:
        UserError: if there is nothing to train on, or the data of a run from Python is opened by its name.
    """
    whole, name = open_named(data)
    if val is not None:
        other, other_name = open_named(val)
        return RunImages(whole, _fixed_part(other, MOST_HELD_OUT)[0], name, other_name)
    if len(whole) < 2:
        raise UserError(
            f"{whole.name} has {len(whole)} image, but pretraining needs at least 2: one to train on, one held out."
        )
    held_out, train = _fixed_part(whole, max(1, min(MOST_HELD_OUT, len(whole) // 20)))
    return RunImages(train, held_out, name, None)


def _fixed_part(source: ImageSource, size: int) -> tuple[Part, Part]:
    """`size` pseudo-random images, always the same ones, and the others."""
    order = np.random.default_rng(0).permutation(len(source))
    return Part(source, np.sort(order[:size])), Part(source, np.sort(order[size:]))


def read_held_out(
    source: ImageSource, transform: Preparation, max_bad: float
) -> tuple[Float[Tensor, "b c hh ww"], list[BadImage]]:
    """The held-out images that can be read, prepared without randomness, and those that cannot.

    Raises:
        UserError: if none can be read, or more cannot than `max_bad` allows.
    """
    images, bad = [], []
    for i in range(len(source)):
        try:
            images.append(transform(source.read(i)))
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    refuse_unreadable(source, bad, max_bad, held_out=True)
    return torch.stack(images), bad


def training_batches(
    source: ImageSource,
    transform: Callable[[Image.Image | Tensor], Tensor],
    config: RunOptions,
    start_step: int,
    *,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> Generator[Batch]:
    """The micro-batches of one process from `start_step` to the end of the run.

    Close the generator to end the loader's processes.
    """
    sampler = StepSampler(
        len(source),
        config.batch_size,
        seed=config.seed,
        start_step=start_step,
        total_steps=config.steps,
        rank=rank,
        world_size=world_size,
        accumulation=config.accumulation,
    )
    loader = DataLoader(
        ImageDataset(source, transform, config.seed),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.workers,
        worker_init_fn=ignore_stop_requests,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw from the global one in the step in which it starts
    )
    with workers_errors_plain():
        yield from loader
