"""The interface of image sources, parts of a source, labels, and the rule for unreadable images."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crate_mae.data.decode import UnreadableImage, decode
from crate_mae.data.results import BadImage
from crate_mae.errors import UserError, and_more

NO_LABEL = -1
_LEAST_SEEN = 100


class ImageSource(ABC):
    """A fixed, numbered collection of images, with labels if there are any.

    Sources can be pickled and used after a fork, so any number of `DataLoader` workers may share one.

    Attributes:
        name: as the user wrote it, for messages.
        classes: names of the classes, `classes[label]`, or None.
    """

    def __init__(
        self, name: str, labels: Int[np.ndarray, "n"] | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self.name = name
        self.classes = list(classes) if classes is not None else None
        self._labels = labels

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, readable or not."""

    @abstractmethod
    def read(self, i: int) -> Image.Image | Tensor:
        """Read image i, upright and in its own mode, or a tensor c hh ww (uint8, or float in [0, 1]).

        Raises:
            UnreadableImage: if it cannot be decoded completely.
        """

    @abstractmethod
    def location(self, i: int) -> str:
        """Describe where image i is, so that the user can find it."""

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """The label of every image, or None if the source has none."""
        return self._labels

    def label(self, i: int) -> int:
        """Label of image i; `NO_LABEL` (-1) without labels."""
        return NO_LABEL if self._labels is None else int(self._labels[i])

    def fingerprint(self) -> str | None:
        """Return a text that changes if an image may have changed; None if that is unknown, as for Python objects."""
        return None


class EncodedSource(ImageSource):
    """A source whose images are files, or bytes of files inside larger ones."""

    @abstractmethod
    def content(self, i: int) -> bytes:
        """Read the encoded bytes of image i.

        Raises:
            UnreadableImage: if they cannot be read.
        """

    def read(self, i: int) -> Image.Image:
        """Decode image i, upright and in its own mode."""
        return decode(self.content(i), self.location(i))


class Part(ImageSource):
    """Some images of a source, as a source of their own.

    Args:
        whole: the source.
        indices: numbers of the images in it.
        labels: one per image of the part, in place of the source's; without them the part has none.
        classes: names of the classes of these labels.
    """

    def __init__(
        self,
        whole: ImageSource,
        indices: Int[np.ndarray, "n"],
        *,
        labels: Int[np.ndarray, "n"] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(whole.name, labels, classes if labels is not None else whole.classes)
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


def read_file(path: Path, location: str) -> bytes:
    """Read all bytes of an image file.

    Raises:
        UnreadableImage: with the operating system's reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(location, (error.strerror or str(error)).lower()) from error


def files_fingerprint(paths: Iterable[Path]) -> str | None:
    """Digest paths, sizes and modification times; return None if a file is not accessible."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            status = path.stat()
            digest.update(os.fsencode(path.absolute()) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    except OSError:
        return None
    return digest.hexdigest()


def printable(path: PurePath) -> str:
    """Convert a path to text for messages and tables, even if its name is not valid Unicode."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def number_labels(found: Sequence[Any]) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    """Convert labels as they were found, all integers or all names, to numbers and class names.

    Names are numbered in sorted order. If any label is missing or negative, there are no labels.
    """
    if not len(found) or any(label is None for label in found):
        return None, None
    if all(isinstance(label, str) for label in found):
        classes = sorted(set(found))
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in found], dtype=np.int64), classes
    if not all(isinstance(label, (int, np.integer)) and label >= 0 for label in found):
        return None, None
    return np.array(found, dtype=np.int64), None


@runtime_checkable
class Labelled(Protocol):
    """Anything with a name, labels and names of classes, such as an `ImageSource`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """Numbers of classes, or None."""
        ...

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, or None."""
        ...


def label_names(source: Labelled) -> list[str | None] | None:
    """Return the class of every image: its name, or its number as text; None where it is unknown, and without labels.

    The same number may stand for different classes in two sources, so sources are compared by names.
    """
    labels = source.labels
    if labels is None:
        return None
    return [None if label < 0 else _name(source, int(label)) for label in labels]


def occurring_classes(source: Labelled) -> list[str]:
    """Return the names of classes that have an image, in the order of their numbers; empty without labels."""
    labels = source.labels
    return [] if labels is None else [_name(source, int(label)) for label in np.unique(labels) if label >= 0]


def align_classes(train: Labelled, val: Labelled, *, same: bool = False) -> list[str]:
    """Return the classes of the training images, after checking that a classifier of them can be measured on `val`.

    Classes are compared by name, or by number as text where they have no names.

    Args:
        train: training images.
        val: validation images, which may only have classes of the training images.
        same: whether the validation images must have all of these classes.

    Raises:
        UserError: if either has no labels, their classes differ, or there is only one class.
    """
    for source, option in ((train, "--train"), (val, "--val")):
        if source.labels is None or not (source.labels >= 0).any():
            raise UserError(
                f"{source.name} ({option}) has no labels.\n"
                "Labels are class folders, a label column in .parquet, .cls files in .tar shards, or (image, label) "
                "pairs."
            )
    classes, found = (list(dict.fromkeys(occurring_classes(source))) for source in (train, val))
    missing = [name for name in classes if name not in found]
    unknown = [name for name in found if name not in classes]
    if unknown or (same and missing):
        only = {train.name: missing, val.name: unknown}
        raise UserError(
            "Training and validation images have different classes:\n"
            + "; ".join(f"only in {name}: {and_more(names, 5)}" for name, names in only.items() if names)
            + ".\nBoth need the same classes, by name (or by number, where they have no names)."
        )
    if len(classes) < 2:
        raise UserError(f"All images of {train.name} are of one class ({classes[0]}): there is nothing to tell apart.")
    return classes


def aligned_labels(source: Labelled, classes: list[str]) -> Int[np.ndarray, "n"]:
    """Return the labels of a source as positions in `classes`; -1 for images without a label of these classes."""
    number = {name: i for i, name in enumerate(classes)}
    labels = [] if source.labels is None else source.labels.tolist()
    return np.array(
        [number.get(_name(source, label), NO_LABEL) if label >= 0 else NO_LABEL for label in labels], dtype=np.int64
    )


def _name(source: Labelled, label: int) -> str:
    return source.classes[label] if source.classes is not None and label < len(source.classes) else str(label)


def most_bad(max_bad: float, seen: int) -> float:
    """Return how many unreadable images are allowed among `seen` distinct ones if their largest share is `max_bad`.

    The share is taken of at least 100 images, so that one bad file at the very beginning does not stop a run. With
    `max_bad=0` none is allowed.
    """
    return max_bad * max(seen, _LEAST_SEEN)


def refuse_unreadable(source: ImageSource, bad: Sequence[BadImage], max_bad: float, *, held_out: bool = False) -> None:
    """Raise a `UserError` if more images of a source cannot be read than `max_bad` allows.

    Args:
        source: the images.
        bad: those that cannot be read.
        max_bad: largest share of unreadable images.
        held_out: whether results are measured on the images, which then need at least one that can be read.
    """
    if len(bad) <= most_bad(max_bad, len(source)) and not (held_out and len(bad) == len(source)):
        return
    images = "held-out images" if held_out else f"images of {source.name}"
    limit = "" if held_out else f", more than --max-bad {max_bad:g} allows"
    remedy = "give other images with --val" if held_out else "raise --max-bad"
    raise UserError(
        f"{len(bad)} of {len(source)} {images} cannot be read{limit}, such as\n{bad[0].location}: {bad[0].reason}\n"
        f"Fix or remove them (crate-mae data check {source.name} lists them), or {remedy}."
    )
