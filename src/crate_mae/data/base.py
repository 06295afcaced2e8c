"""The interface of image sources, parts of a source, labels, and the rule for unreadable images."""

import contextlib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crate_mae.data.decode import MOST_BYTES, UNBOUNDED_MODES, UnreadableImage, decode, deep_to_unit, range_of
from crate_mae.data.files import read_regular, reason_of
from crate_mae.data.results import BadImage
from crate_mae.errors import UserError, and_more

NO_LABEL = -1
_LEAST_SEEN = 100
_RANGE_SAMPLE = 100  # images
LARGEST_LABEL = 2**63 - 1


class ImageSource(ABC):
    """A fixed, numbered collection of images, with labels if there are any.

    A source of files gives the bytes of an image (`EncodedSource.content`), every source its pixels (`picture`); `read`
    also scales the few images whose values have no bounds. `ImageDataset` gives what `read` returns to its transform.

    Sources can be pickled and used after a fork, so any number of `DataLoader` workers may share one.

    Attributes:
        name: as the user wrote it, for messages.
        classes: names of the classes, `classes[label]`, or None.
        left_out: number of files beside the images that are not read, by suffix or kind.

    Raises:
        UserError: if a label has no name, but there are names.
    """

    def __init__(
        self, name: str, labels: Int[np.ndarray, "n"] | None = None, classes: Sequence[object] | None = None
    ) -> None:
        self.name = text_of(name)
        self.classes = [text_of(str(known)) for known in classes] if classes is not None else None
        self.left_out: dict[str, int] = {}
        self._labels = labels
        self._ranges: dict[str, tuple[float, float]] = {}
        self._check_names(labels)

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, readable or not."""

    @abstractmethod
    def picture(self, i: int) -> Image.Image | Tensor:
        """Image i, upright and in its own mode, or a tensor c hh ww (uint8, or float in [0, 1]).

        Raises:
            UnreadableImage: if it cannot be decoded completely.
        """

    def repeatable_picture(self, i: int) -> Image.Image | Tensor:
        """`picture`, and the same one at every call."""
        return self.picture(i)

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

    def read(self, i: int) -> Image.Image | Tensor:
        """`picture`, but one of a mode without bounds is scaled to [0, 1] by the `value_range` of its source."""
        picture = self.picture(i)
        if isinstance(picture, Tensor) or picture.mode not in UNBOUNDED_MODES:
            return picture
        low, high = self.value_range(picture.mode)
        # No image of the sample may have this mode.
        return deep_to_unit(picture, (low, high) if low < high else None)

    def value_range(self, mode: str) -> tuple[float, float]:
        """The values that become 0 and 1 in all images of a mode without bounds: I (32 bits) or F (float).

        They are measured once, on a fixed sample of 100 images; see `range_of`.
        """
        if mode not in self._ranges:
            self._ranges[mode] = range_of(self._sample_of_mode(mode))
        return self._ranges[mode]

    def _sample_of_mode(self, mode: str) -> Iterator[Image.Image]:
        for i in fixed_sample(len(self), _RANGE_SAMPLE):
            with contextlib.suppress(UnreadableImage):
                picture = self.picture(i)
                if isinstance(picture, Image.Image) and picture.mode == mode:
                    yield picture

    def _check_names(self, labels: Int[np.ndarray, "n"] | None) -> None:
        if self.classes is not None and labels is not None and len(labels):
            refuse_unnamed(self.name, int(labels.max()), self.classes)

    def fingerprint(self) -> str | None:
        """Return a text that changes if an image may have changed; None if that is unknown, as for Python objects."""
        return None

    @property
    def check_command(self) -> str | None:
        """The command that lists the images that cannot be read; None if no command can, as for Python objects."""
        return f"crate-mae data check {shlex.quote(self.name)}"

    def origins(self) -> Iterator[str]:
        """What each image is, in order, whichever way the source was opened, such as the real path of its file."""
        return (self.location(i) for i in range(len(self)))


class EncodedSource(ImageSource):
    """A source whose images are files, or bytes of files inside larger ones."""

    @abstractmethod
    def content(self, i: int) -> bytes:
        """Read the encoded bytes of image i.

        Raises:
            UnreadableImage: if they cannot be read.
        """

    def picture(self, i: int) -> Image.Image:
        """Image i, decoded."""
        return decode(self.content(i), self.location(i))


class Part(ImageSource):
    """Some images of a source, by their numbers in it, as a source of their own.

    It has the labels and classes that are given, one label per image of the part; by default those of the source.
    """

    def __init__(
        self,
        whole: ImageSource,
        indices: Int[np.ndarray, "n"],
        *,
        labels: Int[np.ndarray, "n"] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if labels is None:
            labels, classes = None if whole.labels is None else whole.labels[indices], whole.classes
        super().__init__(whole.name, labels, classes)
        self.left_out = whole.left_out
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def picture(self, i: int) -> Image.Image | Tensor:
        """Image i of the part."""
        return self._whole.picture(int(self._indices[i]))

    def repeatable_picture(self, i: int) -> Image.Image | Tensor:
        """That of the whole source."""
        return self._whole.repeatable_picture(int(self._indices[i]))

    def value_range(self, mode: str) -> tuple[float, float]:
        """That of the whole source."""
        return self._whole.value_range(mode)

    def location(self, i: int) -> str:
        """Where image i of the part is."""
        return self._whole.location(int(self._indices[i]))

    @property
    def check_command(self) -> str | None:
        """That of the whole source."""
        return self._whole.check_command

    def origins(self) -> Iterator[str]:
        """Those of the whole source, at the images of the part."""
        origins = list(self._whole.origins())
        return (origins[i] for i in self._indices)


def read_all(
    source: ImageSource, indices: Iterable[int], prepare: Callable[[Image.Image | Tensor], Any], most: int | None = None
) -> tuple[dict[int, Any], list[BadImage]]:
    """Read and prepare up to `most` images.

    Returns:
        the readable images by number, and the unreadable ones met on the way.
    """
    read: dict[int, Any] = {}
    bad: list[BadImage] = []
    for i in indices:
        if len(read) == most:
            break
        try:
            read[i] = prepare(source.read(i))
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    return read, bad


def read_file(path: Path, location: str) -> bytes:
    """Read all bytes of an image file: a regular file of at most `MOST_BYTES` bytes.

    Raises:
        UnreadableImage: with the operating system's reason.
    """
    try:
        return read_regular(path, MOST_BYTES)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UnreadableImage(location, reason_of(error)) from error


def path_text(path: PurePath) -> str:
    """Convert a path to text for messages and tables, even if its name is not valid Unicode."""
    return text_of(str(path))


def text_of(name: str) -> str:
    r"""A name that can be written to any file: bytes that are not valid Unicode become "\udcff" and the like."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def fixed_sample(length: int, sample: int | None, seed: int = 0) -> list[int]:
    """Draw `sample` distinct pseudo-random numbers below `length`, sorted for quick reading; all numbers for None."""
    if sample is None or sample >= length:
        return list(range(length))
    if sample < 1:
        raise UserError(f"A sample needs at least one image, got {sample}.")
    return sorted(np.random.default_rng(seed).choice(length, sample, replace=False).tolist())


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `length`, or all: data are often sorted, with the first images all alike."""
    return [i * length // count for i in range(count)] if count < length else list(range(length))


def evenly_spaced_first(length: int, count: int) -> Iterator[int]:
    """All numbers below `length`, the evenly spaced ones first; the others may replace what cannot be read."""
    first = evenly_spaced(length, count)
    yield from first
    taken = set(first)
    yield from (i for i in range(length) if i not in taken)


def refuse_unnamed(name: str, largest: int, classes: Sequence[str]) -> None:
    """Raise a `UserError` if the largest label of the data of this name has none among the names of its classes."""
    if largest >= len(classes):
        raise UserError(
            f"{name} has the label {largest}, but names for {len(classes)} classes only ({and_more(classes, 5)}).\n"
            "Classes are numbered from 0: fix the labels or the names."
        )


def number_labels(found: Sequence[Any]) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    """Convert labels as they were found, whole numbers or names, to numbers and class names.

    Numbers stay as they are, unless other labels are names or a number is too large for 64 bits: then all are names,
    which are numbered in sorted order. If any label is missing or negative, there are no labels.
    """
    if not len(found) or not all(isinstance(label, (int, np.integer, str)) for label in found):
        return None, None
    numbers = [label for label in found if not isinstance(label, str)]
    if any(number < 0 for number in numbers):
        return None, None
    if len(numbers) == len(found) and max(numbers) <= LARGEST_LABEL:
        return np.array(found, dtype=np.int64), None
    names = [text_of(str(label)) for label in found]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], dtype=np.int64), list(number)


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

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, or None."""


def label_names(source: Labelled) -> list[str | None] | None:
    """Return the class of every image: its name, or its number as text; None where it is unknown, and without labels.

    The same number may stand for different classes in two sources, so sources are compared by names.
    """
    labels = source.labels
    return None if labels is None else [None if label < 0 else _name(source, int(label)) for label in labels]


def occurring_classes(source: Labelled) -> list[str]:
    """Return the names of classes that have an image, in the order of their numbers; empty without labels."""
    labels = source.labels
    return [] if labels is None else [_name(source, int(label)) for label in np.unique(labels) if label >= 0]


def align_classes(train: Labelled, val: Labelled, *, same: bool = False) -> list[str]:
    """Return the classes of the training images, after checking that a classifier of them can be measured on `val`.

    Classes are compared by name, or by number as text where they have no names. The validation images may only have
    classes of the training images, and must have all of them if they are to have the `same`.

    Raises:
        UserError: if either has no labels, their classes differ, or there is only one class.
    """
    for source, option in ((train, "--train"), (val, "--val")):
        if source.labels is None or not (source.labels >= 0).any():
            raise UserError(
                f"{source.name} ({option}) has no labels.\n"
                "Labels are two or more class folders, the columns file_name and label of a metadata.csv in the\n"
                "folder, a label column in .parquet, .cls files in .tar shards, or (image, label) pairs."
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
        raise UserError(
            f"All images of {train.name} are of one class ({classes[0]}): a classifier needs at least two classes."
        )
    return classes


def aligned_labels(source: Labelled, classes: list[str]) -> Int[np.ndarray, "n"]:
    """Return the labels of a source as positions in `classes`; -1 for images without a label of these classes."""
    number: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(name, NO_LABEL) for name in label_names(source) or []], dtype=np.int64)


def _name(source: Labelled, label: int) -> str:
    return str(label) if source.classes is None else source.classes[label]


def most_bad(max_bad: float, seen: int) -> float:
    """Return how many unreadable images are allowed among `seen` distinct ones if their largest share is `max_bad`.

    The share is taken of at least 100 images, so that one bad file at the very beginning does not stop a run. With
    `max_bad=0` none is allowed.
    """
    return max_bad * max(seen, _LEAST_SEEN)


def none_readable(images: str, first: BadImage) -> UserError:
    """The error that no image can be read: of which ones, such as "No image of photos", and the `first` of them."""
    return UserError(f"{images} can be read. The first is\n{first.location}: {first.reason}")


def refuse_unreadable(source: ImageSource, bad: Sequence[BadImage], max_bad: float, *, measured: str = "") -> None:
    """Raise a `UserError` if more images of a source cannot be read (`bad`) than the share `max_bad` allows.

    At least one image must be readable of those that results are measured on; `measured` is what they are called.
    """
    if len(bad) <= most_bad(max_bad, len(source)) and not (measured and len(bad) == len(source)):
        return
    images = measured or f"images of {source.name}"
    limit = "" if measured else f", more than the limit (a share of {max_bad:g})"
    remedy = "give other images with --val" if measured else "raise the limit with --max-bad"
    listed = f" ({source.check_command} lists them)" if source.check_command else ""
    raise UserError(
        f"{len(bad)} of {len(source)} {images} cannot be read{limit}, such as\n{bad[0].location}: {bad[0].reason}\n"
        f"Fix or remove them{listed}, or {remedy}."
    )
