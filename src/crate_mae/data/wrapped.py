"""Any indexable data set, such as those of PyTorch; those of torchvision, and the digits of scikit-learn, by name."""

import contextlib
import inspect
from collections.abc import Container, Iterator
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torchvision
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crate_mae.data.base import LARGEST_LABEL, NO_LABEL, ImageSource, number_labels
from crate_mae.data.dataset import default_generator_seeded, global_generators_seeded
from crate_mae.data.decode import UnreadableImage, decode, upright
from crate_mae.data.files import cache_folder
from crate_mae.errors import UserError, did_you_mean, first_line

_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "jpg", "png", "x")
_LABEL_KEYS = ("label", "labels", "class", "target", "cls", "fine_label", "y")
_TEST_DIGITS = 297


@runtime_checkable
class Indexable(Protocol):
    """An object with a length and numbered items, such as a list of images or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource(ImageSource):
    """A map-style data set whose items are images, `(image, label)` pairs, or dicts with an image and perhaps a label.

    An image is a Pillow image, a tensor (hh ww, or c hh ww), a NumPy array (hh ww, or hh ww c), or encoded bytes.
    Arrays and tensors are uint8, uint16, or floats in [0, 1]. A Pillow image of a file is turned upright like the file
    itself. Labels are whole numbers or names.
    """

    def __init__(self, dataset: Indexable, name: str | None = None) -> None:
        classes = getattr(dataset, "classes", None)
        known = classes if isinstance(classes, (list, tuple)) else None
        super().__init__(name or type(dataset).__name__, classes=known)
        if not len(dataset):
            raise UserError(f"The data set {self.name} is empty.")
        self._dataset = dataset
        self._last: tuple[int, Any] | None = None
        self._labels_known = False

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @property
    def check_command(self) -> str | None:
        """None for an object of Python, which no command can open."""
        return super().check_command if self.name.startswith("torchvision:") else None

    def picture(self, i: int) -> Image.Image | Tensor:
        """The image of item i."""
        image = _image_of(self._item(i))
        if isinstance(image, bytes):
            return decode(image, self.location(i))
        if isinstance(image, Image.Image):
            return upright(image, self.location(i))
        if isinstance(image, np.ndarray):
            image = _array_to_tensor(image, self.location(i))
        if isinstance(image, Tensor):
            return _unit_tensor(image, self.location(i))
        raise UserError(
            f"{self.location(i)} is a {type(image).__name__}, not an image.\n"
            "Items are images (Pillow, tensor, array, bytes), (image, label) pairs, or dicts with the key image."
        )

    def repeatable_picture(self, i: int) -> Image.Image | Tensor:
        """`picture` with seeded generators, since a data set may change its images at random."""
        with default_generator_seeded(0), global_generators_seeded(0):
            return self.picture(i)

    def location(self, i: int) -> str:
        """The name of the data set and the item's number."""
        return f"{self.name}[{i}]"

    def origins(self) -> Iterator[str]:
        """The Python object and the items' numbers."""
        return (f"object {id(self._dataset)} item {i}" for i in range(len(self)))

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """Labels of all items: from `targets` or `labels` of the data set, otherwise by reading every item once."""
        if not self._labels_known:
            self._labels = _listed_labels(self._dataset)
            if self._labels is None:
                self._labels = self._collect_labels()
            self._labels_known = True
            self._check_names(self._labels)
        return self._labels

    def label(self, i: int) -> int:
        """Label of item i, without reading any other item: -1 for a name, until `labels` has numbered the names."""
        if self._labels_known:
            return super().label(i)
        label = _label_of(self._item(i))
        if label is None or isinstance(label, str):
            return NO_LABEL
        self._check_names(np.array([label]))
        return label

    def _collect_labels(self) -> Int[np.ndarray, "n"] | None:
        found: dict[int, int | str] = {}
        for i in range(len(self)):
            with contextlib.suppress(UnreadableImage):
                label = _label_of(self._item(i))
                if label is None:
                    return None
                found[i] = label
        numbers, classes = number_labels(list(found.values()))
        if numbers is None:
            return None
        if classes is not None:
            known = self.classes
            if known is not None and set(classes) <= set(known):  # numbered as the data set's own classes are
                numbers, classes = np.array([known.index(name) for name in classes], dtype=np.int64)[numbers], known
            self.classes = classes
        labels = np.full(len(self), NO_LABEL, dtype=np.int64)
        labels[list(found)] = numbers
        return labels

    def _item(self, i: int) -> Any:
        """Return item i. The last one is kept, since its label is mostly requested right after its image."""
        if self._last is None or self._last[0] != i:
            try:
                self._last = (i, self._dataset[i])
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors for damaged files
                raise UnreadableImage(self.location(i), first_line(error)) from error
        return self._last[1]


def _image_of(item: Any) -> Any:
    if isinstance(item, (tuple, list)):
        return item[0] if item else None
    if isinstance(item, dict):
        if isinstance(item.get("bytes"), bytes):
            return item["bytes"]
        key = next((key for key in _IMAGE_KEYS if key in item), None)
        return _image_of(item[key]) if key is not None and not isinstance(item[key], (tuple, list)) else None
    return item


def _label_of(item: Any) -> int | str | None:
    label: Any
    if isinstance(item, (tuple, list)):
        label = item[1] if len(item) > 1 else None
    elif isinstance(item, dict):
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    else:
        return None
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, (int, np.integer)) and label >= 0:
        return int(label) if label <= LARGEST_LABEL else str(label)
    return str(label) if isinstance(label, str) else None


def _listed_labels(dataset: Any) -> Int[np.ndarray, "n"] | None:
    """Return the data set's own list of labels, unless it transforms labels."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in ("targets", "labels"):
        listed: Any = getattr(dataset, attribute, None)
        if isinstance(listed, (list, Tensor, np.ndarray)):
            try:
                labels = np.asarray(listed)
            except (TypeError, ValueError):  # several labels to an image, or on a GPU: read with each image
                continue
            whole = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
            if whole and labels.min() >= 0 and labels.max() <= LARGEST_LABEL:
                return labels.astype(np.int64)
    return None


def _array_to_tensor(array: np.ndarray, location: str) -> Tensor:
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise UserError(f"{location} has the type {array.dtype}; an image is uint8, uint16, or float in [0, 1].")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # PyTorch warns about arrays that are not writeable, such as the pixels of a Pillow image: those are copied.
    tensor = torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())
    return tensor.permute(2, 0, 1).contiguous() if tensor.ndim == 3 else tensor


def _unit_tensor(image: Tensor, location: str) -> Tensor:
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3:
        raise UserError(f"{location} has the shape {tuple(image.shape)}; an image is c hh ww, or hh ww.")
    if not image.numel():
        raise UserError(f"{location} has the shape {tuple(image.shape)}: it has no pixels.")
    if image.dtype == torch.uint16:
        return image.to(torch.float32) / 65535
    if image.dtype == torch.uint8:
        return image
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):
            raise UserError(
                f"{location} has values from {image.min():.3g} to {image.max():.3g}; a float image is in [0, 1].\n"
                "Divide 8-bit values by 255, and do not normalise: training does that."
            )
        return image.to(torch.float32)
    raise UserError(f"{location} has the type {image.dtype}; an image is uint8, uint16, or float in [0, 1].")


@cache
def _digits() -> Any:
    """The table that scikit-learn ships, read once."""
    from sklearn.datasets import load_digits  # takes over a second to import

    return load_digits()


class DigitsSource(ImageSource):
    """The 1,797 handwritten digits of scikit-learn, grey, 8 x 8; their values 0..16 are scaled to 0..255.

    The splits are defined here: in the order of a permutation with seed 0 the last 297 digits are `test`, the 1,500
    before them `train`. Without a split there are all 1,797, in scikit-learn's order.
    """

    def __init__(self, split: str | None = None) -> None:
        digits = _digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        rows = {None: np.arange(len(order)), "train": order[:-_TEST_DIGITS], "test": order[-_TEST_DIGITS:]}
        if split not in rows:
            raise UserError(f'The digits have no split "{split}": use digits, digits:train or digits:test.')
        self._rows = rows[split]
        self._images = np.rint(digits.images[self._rows] * (255 / 16)).astype(np.uint8)
        labels = digits.target[self._rows].astype(np.int64)
        super().__init__("digits" if split is None else f"digits:{split}", labels, [str(i) for i in range(10)])

    def __len__(self) -> int:
        return len(self._images)

    def picture(self, i: int) -> Image.Image:
        """Digit i in mode L."""
        return Image.fromarray(self._images[i])

    def location(self, i: int) -> str:
        """The number of the digit in `load_digits`."""
        return f"digits row {self._rows[i]}"

    def fingerprint(self) -> str:
        """The digits never change."""
        return self.name


def open_torchvision(name: str, split: str | None) -> DatasetSource:
    """Open a data set of torchvision by its class name, downloaded at the first use into the user's cache folder.

    Args:
        name: class name, such as `CIFAR10`.
        split: a split of the class; `train` or `test` if it only has the argument `train`. By default that of the
            class, which nearly always is the training part.

    Raises:
        UserError: for an unknown name or split, or a failed download.
    """
    known = [entry for entry in torchvision.datasets.__all__ if isinstance(getattr(torchvision.datasets, entry), type)]
    if name not in known:
        hint = did_you_mean(name, known, "torchvision:{}") or f" It has: {', '.join(known)}."
        raise UserError(f'torchvision has no data set "{name}".{hint}')
    full_name = f"torchvision:{name}{f':{split}' if split else ''}"
    kind = getattr(torchvision.datasets, name)
    root = cache_folder() / "torchvision"
    parameters = inspect.signature(kind).parameters
    settings = _split_settings(name, split, parameters)
    if "download" in parameters:
        settings["download"] = True
    try:
        root.mkdir(parents=True, exist_ok=True)
        dataset = kind(root=str(root), **settings)
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"Cannot open {full_name}: {first_line(error)}\n"
            f"It is downloaded into {root}: check the network, or put the files there by hand."
        ) from error
    return DatasetSource(dataset, full_name)


def _split_settings(name: str, split: str | None, parameters: Container[str]) -> dict[str, Any]:
    if split is None:
        return {}
    if "split" in parameters:
        return {"split": split}
    if "train" in parameters and split in ("train", "test"):
        return {"train": split == "train"}
    choice = f"torchvision:{name}:train or torchvision:{name}:test" if "train" in parameters else f"torchvision:{name}"
    raise UserError(f'torchvision:{name} has no split "{split}": use {choice}.')
