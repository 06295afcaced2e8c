"""Images for training and evaluation: accessed by key, with randomness that depends on the key alone."""

import os
import random
import re
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from crate_mae.data.base import ImageSource
from crate_mae.data.decode import UnreadableImage, to_unit
from crate_mae.data.results import BadImage
from crate_mae.errors import UserError

MOST_REPLACEMENTS = 20
_AT_ONCE = 16  # images that a process sends together
_LOST = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+(?: \w+)?)|exited unexpectedly)"
)


class Sample(NamedTuple):
    """One prepared image.

    Attributes:
        image: c hh ww as the transform returned it: normalised, or pixels that are to be normalised.
        label: -1 without labels.
        index: number of the image; if another one was requested, that one is in `bad`.
        bad: the images that could not be read before this one.
    """

    image: UInt8[Tensor, "c hh ww"] | Float[Tensor, "c hh ww"]
    label: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - a sample is never searched
    bad: tuple[BadImage, ...]


class Batch(NamedTuple):
    """Stacked samples, and all their unreadable images."""

    images: UInt8[Tensor, "b c hh ww"] | Float[Tensor, "b c hh ww"]
    labels: Int[Tensor, "b"]
    indices: Int[Tensor, "b"]
    bad: tuple[BadImage, ...]


class ImageDataset(Dataset[Sample]):
    """The images of a source, transformed; item `(index, epoch)`, or `index` for epoch 0.

    The randomness of the transform is a function of (seed, epoch, index) alone: the same key gives the same sample
    in any process, in any order, and in a resumed run. The caller's random state is left as it was. Transforms draw
    from PyTorch's default CPU generator, as those of torchvision do.

    An unreadable image is replaced by another, drawn in an order that depends on (seed, epoch, index) too, and
    reported in `Sample.bad`.

    Args:
        source: where the images come from.
        transform: from an image as `source.read` gives it to a tensor c hh ww.
        seed: not negative.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image | Tensor], Tensor], seed: int = 0) -> None:
        if seed < 0:
            raise UserError(f"A seed must not be negative, got {seed}.")
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        bad: list[BadImage] = []
        for candidate in self._candidates(index, epoch):
            try:
                image = self.source.read(candidate)
                label = self.source.label(candidate)
            except UnreadableImage as error:
                bad.append(BadImage(error.location, error.reason))
                continue
            words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
            with default_generator_seeded(int(words[0])):
                return Sample(self.transform(image), label, candidate, tuple(bad))
        command = self.source.check_command
        raise UserError(
            f"{self.source.name}: {len(bad)} images in a row cannot be read, the first of them\n"
            f"{bad[0].location}: {bad[0].reason}" + (f"\nSee them all with: {command}" if command else "")
        )

    def _candidates(self, index: int, epoch: int) -> Iterator[int]:
        """Yield the requested index, then up to `MOST_REPLACEMENTS` others in a fixed pseudo-random order."""
        yield index
        # One word more than for the augmentation, so that the two streams differ.
        draw = np.random.default_rng([self.seed, epoch, index, 1])
        tried = {index}
        while len(tried) <= min(MOST_REPLACEMENTS, len(self.source) - 1):
            other = int(draw.integers(len(self.source)))
            if other not in tried:
                tried.add(other)
                yield other


def collate(attempts: Sequence[Sample | BadImage]) -> Batch:
    """Stack samples into a batch, for `DataLoader(collate_fn=collate)`; images 0 0 0 0 if there are none.

    If some images have 8 bits and others are in [0, 1], all are converted to [0, 1].
    """
    samples = [attempt for attempt in attempts if isinstance(attempt, Sample)]
    images = [sample.image for sample in samples]
    if len({image.dtype for image in images}) > 1:
        images = [to_unit(image) for image in images]
    bad = [attempt.bad if isinstance(attempt, Sample) else (attempt,) for attempt in attempts]
    return Batch(
        torch.stack(images) if images else torch.empty(0, 0, 0, 0),
        torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        tuple(chain.from_iterable(bad)),
    )


def ignore_interrupts(_worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process, in loader processes: the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def readable_batches(
    source: ImageSource,
    transform: Callable[[Image.Image | Tensor], Tensor],
    batch_size: int,
    *,
    workers: int = 0,
    worker_init: Callable[[int], None] = ignore_interrupts,
) -> Generator[Batch]:
    """Yield all images of a source once, in order. Those that cannot be read are left out, and are in `Batch.bad`.

    A batch may be shorter than `batch_size`, and is empty if none of its images can be read.

    Args:
        source: where the images come from.
        transform: without randomness.
        batch_size: images per batch.
        workers: number of processes that load images.
        worker_init: called first in each process.
    """
    prepared = partial(_prepared, source, transform)
    numbers = BatchSampler(range(len(source)), batch_size, drop_last=False)
    yield from load(prepared, numbers, collate, workers=workers, worker_init=worker_init)


def in_parallel(function: Callable[[int], Any], images: int, workers: int) -> Generator[Any]:
    """Yield `function(i)` for i = 0, 1, ..., computed by several processes; a `BadImage` for an `UnreadableImage`."""
    for several in load(function, BatchSampler(range(images), _AT_ONCE, drop_last=False), list, workers=workers):
        yield from several


def _prepared(source: ImageSource, transform: Callable[[Image.Image | Tensor], Tensor], index: int) -> Sample:
    return Sample(transform(source.read(index)), source.label(index), index, ())


def load(
    function: Callable[[Any], Any],
    batches: Iterable[list[Any]],
    collate: Callable[[list[Any]], Any],
    *,
    workers: int,
    worker_init: Callable[[int], None] = ignore_interrupts,
    pin_memory: bool = False,
) -> Generator[Any]:
    """Yield `collate([function(key), ...])` for the keys of each batch, computed by several processes.

    Close the generator to end them. An `UnreadableImage` becomes a `BadImage` in the list. A `UserError` is raised here
    with its own message: PyTorch would send it as the text of a traceback, so that it is sent as a value instead.

    Args:
        function: of an image's key.
        batches: the keys of each batch.
        collate: from what the function returned to a batch.
        workers: number of processes; 0 for none but this one.
        worker_init: called first in each process.
        pin_memory: whether tensors are put where an accelerator copies them from fastest.
    """
    loader = DataLoader(
        _Attempts(function),
        batch_sampler=batches,
        collate_fn=partial(_collate_attempts, collate),
        num_workers=workers,
        worker_init_fn=worker_init,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw from the global one in the step in which it starts
    )
    with explain_lost_processes():
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Attempts(Dataset[Any]):
    """A function of an image's key; its errors about the user's images are values."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.function(key)
        except UnreadableImage as error:
            return BadImage(error.location, error.reason)
        except UserError as error:
            return error


def _collate_attempts(collate: Callable[[list[Any]], Any], attempts: list[Any]) -> Any:
    return next((found for found in attempts if isinstance(found, UserError)), None) or collate(attempts)


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Raise PyTorch's error about a loader process that was ended from outside as a `UserError`."""
    try:
        yield
    except (EOFError, ConnectionError) as error:  # it was ended while it sent a batch
        raise UserError(_lost("A data loader process")) from error
    except RuntimeError as error:
        if message := explain_lost(error):
            raise UserError(message) from error
        raise


def explain_lost(error: BaseException) -> str | None:
    """Explain PyTorch's error about a loader process that was ended from outside; None for every other error."""
    lost = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if lost is None:
        return None
    pids, how = lost[1], lost[2] or ""
    if how.startswith("Bus error"):
        return (
            f"Data loader process {pids} was killed (signal: Bus error): the shared memory (/dev/shm) is too small.\n"
            "Use --workers 0, or more shared memory (docker run --shm-size=8g)."
        )
    return _lost(f"Data loader process {pids}", f" (signal: {how})" if how else "")


def _lost(process: str, how: str = "") -> str:
    return (
        f"{process} was killed{how}, most likely by the operating system because memory ran out.\n"
        "Use fewer --workers or a smaller --batch-size, or stop other programs."
    )


@contextmanager
def global_generators_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy inside the context, and restore their states.

    Args:
        seed: at least 0 and less than 2^32.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # timm draws from this one
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def default_generator_seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's default CPU generator inside the context, and restore its state."""
    with torch.random.fork_rng(devices=()):  # accelerators are left alone: looking for them takes fifty times as long
        torch.default_generator.manual_seed(seed)
        yield


def default_workers(processes: int = 1) -> int:
    """Return how many processes should read images: one less than the cores per training process, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // processes - 1))
