"""The images of a run: which are trained on, which are held out, and how both reach the loop."""

from __future__ import annotations

from collections.abc import Generator
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
    UnreadableImage,
    collate,
    evaluation_transform,
    full_name,
    open_source,
    pretrain_transform,
)
from crate_mae.errors import UserError
from crate_mae.training.bad_images import most_bad
from crate_mae.training.config import PretrainConfig
from crate_mae.training.processes import ignore_stop_requests
from crate_mae.training.sampler import StepSampler

MOST_HELD_OUT = 512
PYTHON_OBJECT = "python:"


class Part(ImageSource):
    """Some images of a source, as a source of their own."""

    def __init__(self, whole: ImageSource, indices: np.ndarray) -> None:
        super().__init__(whole.name, classes=whole.classes)
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> Image.Image | Tensor:
        """Image i of the part."""
        return self._whole.read(int(self._indices[i]))

    def location(self, i: int) -> str:
        """Where image i of the part is."""
        return self._whole.location(int(self._indices[i]))


@dataclass(frozen=True)
class RunImages:
    """Two sources without a common image.

    Attributes:
        train: trained on.
        held_out: measured on.
        taken_out: whether the held-out images were taken out of the training images.
    """

    train: ImageSource
    held_out: ImageSource
    taken_out: bool


def data_name(data: Any) -> str:
    """How a configuration names data: so that a run can be resumed from any folder."""
    return full_name(data) if isinstance(data, (str, Path)) else PYTHON_OBJECT + open_source(data).name


def open_images(data: Any, val: Any = None) -> RunImages:
    """Open training and held-out images.

    Without `val`, max(1, min(512, n // 20)) of the n images are held out: always the same ones, whatever the seed, so
    that runs can be compared. Of a larger `val`, 512 images are taken in the same way.

    Raises:
        UserError: if there is nothing to train on, or the data of a run from Python is opened by its name.
    """
    for source in (data, val):
        if isinstance(source, str) and source.startswith(PYTHON_OBJECT):
            raise UserError(
                f"This run trains on a Python object ({source.removeprefix(PYTHON_OBJECT)}), which has no path.\n"
                "Resume it from Python with the same call as before: crate_mae.pretrain(your_dataset, out=...)."
            )
    whole = open_source(data)
    if val is not None:
        return RunImages(whole, _fixed_part(open_source(val), MOST_HELD_OUT)[0], taken_out=False)
    if len(whole) < 2:
        raise UserError(
            f"{whole.name} has {len(whole)} image, but pretraining needs at least 2: one to train on, one held out."
        )
    held_out, train = _fixed_part(whole, max(1, min(MOST_HELD_OUT, len(whole) // 20)))
    return RunImages(train, held_out, taken_out=True)


def _fixed_part(source: ImageSource, size: int) -> tuple[Part, Part]:
    """`size` pseudo-random images, always the same ones, and the others."""
    order = np.random.default_rng(0).permutation(len(source))
    return Part(source, np.sort(order[:size])), Part(source, np.sort(order[size:]))


def read_held_out(source: ImageSource, config: PretrainConfig) -> tuple[Float[Tensor, "b c hh ww"], list[BadImage]]:
    """The held-out images that can be read, prepared without randomness, and those that cannot.

    Raises:
        UserError: if none can be read, or more cannot than `max_bad` allows.
    """
    transform = evaluation_transform(config.image_size, config.channels, config.mean, config.std)
    images, bad = [], []
    for i in range(len(source)):
        try:
            images.append(transform(source.read(i)))
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    if not images or len(bad) > most_bad(config.max_bad, len(source)):
        raise UserError(
            f"{len(bad)} of {len(source)} held-out images cannot be read, such as\n"
            f"{bad[0].location}: {bad[0].reason}\n"
            f"Mend or remove them (crate-mae data check {source.name} lists them), or give other images with --val."
        )
    return torch.stack(images), bad


def training_batches(
    source: ImageSource,
    config: PretrainConfig,
    start_step: int,
    *,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> Generator[Batch]:
    """The micro-batches of one process from `start_step` to the end of the run.

    Close the generator to end the loader's processes.
    """
    transform = pretrain_transform(
        config.image_size, config.channels, config.mean, config.std, config.min_crop, config.flip
    )
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
    try:
        yield from loader
    except UserError as error:
        # A loader process wraps its errors in a traceback; the user's sentence comes last.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
