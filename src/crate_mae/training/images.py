"""The images of a run, from disk to micro-batches: opened, split, labelled, drawn in order; unreadable ones counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crate_mae.data import (
    BadImage,
    Batch,
    ImageDataset,
    ImageSource,
    Part,
    collate,
    full_name,
    open_source,
    refuse_shared_images,
)
from crate_mae.data.base import align_classes, aligned_labels, label_names, most_bad, text_of
from crate_mae.data.dataset import load
from crate_mae.data.facts import UNREADABLE, content_digests, image_digest
from crate_mae.data.files import PYTHON_OBJECT
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError, and_more
from crate_mae.models.devices import send
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import ignore_stop_requests
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.run_directory import CsvLog

MOST_HELD_OUT = 512
_MOST_NAMED = 5  # classes in a message
_MOST_LISTED = 3  # unreadable images in a message


@dataclass(frozen=True)
class RunImages:
    """Two sources without a common image.

    Attributes:
        train: trained on.
        held_out: measured on.
        train_name: name in the configuration of the data that the first comes from,
        held_out_name: and the second; None if the held-out images were split off the training images.
        split: which images these are, to find them again if the data changes; see `split_record`.
    """

    train: ImageSource
    held_out: ImageSource
    train_name: str
    held_out_name: str | None
    split: Callable[[], dict[str, Any]] | None = None


def open_named(data: Any) -> tuple[ImageSource, str]:
    """Open data, and return its name in a configuration, by which a run can be resumed from any folder.

    Raises:
        UserError: if there is no such data, or the data of a run from Python is opened by its name.
    """
    if not isinstance(data, (str, Path)):
        source = open_source(data)
        return source, PYTHON_OBJECT + source.name
    if isinstance(data, str) and data.startswith(PYTHON_OBJECT):
        raise UserError(
            f"This run uses a Python object ({data.removeprefix(PYTHON_OBJECT)}), which has no path.\n"
            "Resume it from Python with the same call as before: crate_mae.pretrain(your_dataset, out=...) or the like."
        )
    name = full_name(data)
    if name != text_of(name):
        raise UserError(
            f"{text_of(name)} is not valid Unicode, so the run could not be resumed by this name.\n"
            "Rename it, or give a link to it."
        )
    return open_source(name), name


def open_images(
    data: Any, val: Any = None, record: Mapping[str, Any] | None = None, *, data_changed: bool = False
) -> RunImages:
    """Open training and held-out images.

    Without `val`, max(1, min(512, n // 20)) of the n images are held out: always the same ones, whatever the seed, so
    that runs can be compared. Of a larger `val`, 512 images are taken in the same way.

    A run that exists has a `record`, which `split_record` made. With `data_changed`, its images are found by their
    content, in data with others: the run continues being measured on images that it has not been trained on.

    Raises:
        UserError: if there is nothing to train on, or the data of a run from Python is opened by its name.
    """
    whole, name = open_named(data)
    if val is not None:
        other, other_name = open_named(val)
        refuse_shared_images(whole, other, "DATA", "the held-out loss would be measured on training images")
        return RunImages(whole, Part(other, _held_out_sample(other, MOST_HELD_OUT)), name, other_name)
    if len(whole) < 2:
        raise UserError(
            f"{whole.name} has {len(whole)} image, but pretraining needs at least 2: one to train on, one held out."
        )
    held_out = _held_out_sample(whole, max(1, min(MOST_HELD_OUT, len(whole) // 20)))
    if record is not None and data_changed:
        held_out = _found_again(whole, record)
    elif record is not None and record["images"] == len(whole):
        held_out = np.array(record["held_out"], dtype=np.int64)
    train = np.setdiff1d(np.arange(len(whole)), held_out)
    split = partial(split_record, whole, held_out)
    return RunImages(Part(whole, train), Part(whole, held_out), name, None, split)


def _held_out_sample(source: ImageSource, size: int) -> np.ndarray:
    """Numbers of `size` pseudo-random images, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(len(source))[:size])


def split_record(whole: ImageSource, held_out: np.ndarray) -> dict[str, Any]:
    """What finds held-out images again: their numbers among so many images, and digests of their contents."""
    return {
        "images": len(whole),
        "held_out": held_out.tolist(),
        "sha256": [image_digest(whole, int(i)) for i in held_out],
    }


def _found_again(whole: ImageSource, record: Mapping[str, Any]) -> np.ndarray:
    known = set(record["sha256"]) - {"", UNREADABLE}
    found = [i for i in range(len(whole)) if image_digest(whole, i) in known]
    if not 0 < len(found) < len(whole):
        which = "None" if not found else "All"
        raise UserError(
            f"{which} of the images of {whole.name} are among those that this run holds out and measures on.\n"
            "To continue, it needs some of them, and others to train on. Or start a new run with another --out."
        )
    return np.array(found, dtype=np.int64)


def open_labelled(train: Any, val: Any, share: float, seed: int) -> RunImages:
    """Open training and validation images, and give their classes the same numbers; see `stratified_share`.

    Raises:
        UserError: without labels, with one class only, with other classes in one than in the other, or if the share
            leaves a class without an image.
    """
    (train_images, train_name), (val_images, val_name) = open_named(train), open_named(val)
    refuse_shared_images(train_images, val_images, "--train", "the best model would be the one that memorises them")
    classes = align_classes(train_images, val_images, same=True)
    numbered = aligned_labels(train_images, classes)
    chosen = np.arange(len(numbered)) if share == 1 else stratified_share(numbered, classes, share, seed)
    val_numbered = aligned_labels(val_images, classes)
    return RunImages(
        Part(train_images, chosen, labels=numbered[chosen], classes=classes),
        Part(val_images, np.arange(len(val_numbered)), labels=val_numbered, classes=classes),
        train_name,
        val_name,
    )


HELD_OUT_DATA = frozenset({"held-out images", "held-out labels"})  # names in `data_digests`


def data_digests(train: ImageSource, held_out: ImageSource, *, with_labels: bool) -> dict[str, str]:
    """Digests by which a resumed run notices that its data has changed, by what has changed.

    Of all images the names count, of a fixed sample the contents. Names are taken without what all have in common, so
    that data may move to another folder.
    """
    sources = {"training": train, "held-out": held_out}
    found = {f"{name} images": _images_digest(source) for name, source in sources.items()}
    if with_labels:
        found |= {f"{name} labels": _digest(map(str, label_names(source) or [])) for name, source in sources.items()}
    return found


def _images_digest(source: ImageSource) -> str:
    names = [source.location(i) for i in range(len(source))]
    common = len(os.path.commonprefix(names))  # noqa: RUF071  # names need not be paths
    return _digest([name[common:] for name in names] + content_digests(source))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def stratified_share(labels: np.ndarray, classes: list[str], share: float, seed: int) -> np.ndarray:
    """Choose round(share n) of the n images of each class: a function of the seed, and in the order of the images.

    A larger share of the same seed holds all images of a smaller one.

    Raises:
        UserError: if a class is left without an image.
    """
    draw = np.random.default_rng(derive_seed(seed, Purpose.LABELS))
    chosen, empty = [], []
    for number, name in enumerate(classes):
        members = draw.permutation(np.flatnonzero(labels == number))
        wanted = round(share * len(members))
        chosen.append(members[:wanted])
        if not wanted:
            empty.append(f"{name} ({len(members)})")
    if empty:
        raise UserError(
            f"--labels {share:g} leaves no image of {and_more(empty, _MOST_NAMED)}: in brackets, how many images there "
            "are.\nGive a larger share."
        )
    return np.sort(np.concatenate(chosen))


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in an epoch: a permutation that depends on (seed, epoch) only."""
    return np.random.default_rng(derive_seed(seed, Purpose.ORDER, epoch)).permutation(num_images)


def micro_slices(global_batch: int, rank: int, world_size: int, accumulation: int) -> list[slice]:
    """The parts of a global batch that one process computes, one slice per micro-batch.

    Processes take consecutive shares, and each share is divided into consecutive micro-batches of equal size, so that
    the mean of the micro-batches' losses is the loss of the global batch.
    """
    micro = global_batch // (world_size * accumulation)
    assert micro * world_size * accumulation == global_batch, "the configuration is checked for this"
    first = rank * accumulation
    return [slice(i * micro, (i + 1) * micro) for i in range(first, first + accumulation)]


def step_batches(
    num_images: int, config: RunOptions, start_step: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The micro-batches of one process from `start_step` to the end of the run, as lists of (image, epoch) keys.

    It has no state but the step, so a resumed run continues with exactly the images that come next; and it never ends
    at an epoch, so loading never stalls between two. The last images of an epoch that fill no batch are left out;
    another permutation leaves out others.
    """
    size, seed = config.batch_size, config.seed
    slices = micro_slices(size, rank, world_size, config.accumulation)
    order, order_epoch = np.empty(0, dtype=np.int64), -1
    for step in range(start_step, config.steps):
        epoch, position = divmod(step, num_images // size)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(seed, epoch, num_images), epoch
        batch = order[position * size : (position + 1) * size]
        for part in slices:
            yield [(int(index), epoch) for index in batch[part]]


def training_batches(
    source: ImageSource,
    transform: Preparation,
    config: RunOptions,
    start_step: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Generator[Batch]:
    """The images of `step_batches`, normalised on a device. Close the generator to end the loader's processes.

    What travels between processes, and to the device, has 8 bits a pixel: a fourth of the bytes of normalised images.
    """
    loaded = load(
        ImageDataset(source, transform.pixels, config.seed).__getitem__,
        step_batches(len(source), config, start_step, rank=rank, world_size=world_size),
        collate,
        workers=config.workers,
        worker_init=ignore_stop_requests,
        pin_memory=device.type == "cuda",
    )
    with closing(loaded):
        for batch in loaded:
            images = transform.normalise(send(batch.images, device))
            if device.type == "cuda":  # so that its convolution gives patches one after another, as tokens
                images = images.contiguous(memory_format=torch.channels_last)
            yield batch._replace(images=images, labels=send(batch.labels, device))


class BadImages:
    """The distinct unreadable images of a run.

    A run may meet max_bad * max(seen, 100) of them, where `seen` is the number of distinct images it has asked for so
    far. The 100 keep one bad file at the very beginning from stopping a run; with `max_bad=0` the first one stops it.
    What the table bad_files.csv lists is known already; one process writes new ones into it.
    """

    def __init__(self, table: CsvLog, max_bad: float, *, writes: bool = True) -> None:
        self.table = table
        self.max_bad = max_bad
        self.writes = writes
        self.reasons = {row["location"]: row["reason"] for row in table.read()}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, step: int, found: Iterable[BadImage]) -> bool:
        """Write down images that were not known to be bad; return whether there were any."""
        rows = []
        for location, reason in found:
            location, reason = " ".join(location.splitlines()), " ".join(reason.split())
            if location not in self.reasons:
                self.reasons[location] = reason
                rows.append({"step": step, "location": location, "reason": reason})
        if self.writes:
            self.table.append(rows)
        return bool(rows)

    def too_many(self, seen: int) -> bool:
        """Whether there are more than a run may meet among `seen` distinct images."""
        return len(self) > most_bad(self.max_bad, seen)

    def error(self, seen: int, resume_without: str, *, check: str | None = None, origin: str = "") -> UserError:
        """The error to raise when there are too many, with commands to list all and to continue without them."""
        first = "; ".join(f"{location} ({reason})" for location, reason in list(self.reasons.items())[:_MOST_LISTED])
        others = f"; {check} finds the others" if check else ""
        return UserError(
            f"{len(self)} of the first {seen} images cannot be read, more than --max-bad {self.max_bad:g}{origin} "
            "allows.\n"
            f"They begin with {first}.\n"
            f"All so far are listed in {self.table.path}{others}. Fix or remove them, then: {resume_without}\n"
            "Or give the command that started the run once more, with a larger --max-bad."
        )
