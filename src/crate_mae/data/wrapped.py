"""Any indexable data set, such as those of PyTorch."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crate_mae.data.base import LARGEST_LABEL, NO_LABEL, ImageSource, number_labels
from crate_mae.data.decode import UnreadableImage, decode, upright
from crate_mae.errors import UserError, first_line

_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "jpg", "png", "x")
_LABEL_KEYS = ("label", "labels", "class", "target", "cls", "fine_label", "y")


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

    def read(self, i: int) -> Image.Image | Tensor:
        """The image of item i; a Pillow image of mode I or F is scaled by `value_range`."""
        return self._in_range(self.picture(i))

    @property
    def check_command(self) -> str | None:
        """None for an object of Python, which no command can open."""
        return super().check_command if self.name.startswith("torchvision:") else None

    def picture(self, i: int) -> Image.Image | Tensor:
        """The image of item i, a Pillow image in its own mode."""
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
            numbers, self.classes = _numbered_as(self.classes, numbers, classes)
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


def _numbered_as(
    known: list[str] | None, numbers: Int[np.ndarray, "n"], names: list[str]
) -> tuple[Int[np.ndarray, "n"], list[str]]:
    """Labels that are names, numbered as the data set's own classes are if all of them are among those."""
    if known is None or not set(names) <= set(known):
        return numbers, names
    return np.array([known.index(name) for name in names], dtype=np.int64)[numbers], known


def _listed_labels(dataset: Any) -> Int[np.ndarray, "n"] | None:
    """Return the data set's own list of labels, unless it transforms labels."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in ("targets", "labels"):
        listed: Any = getattr(dataset, attribute, None)
        if isinstance(listed, (list, Tensor, np.ndarray)):
            labels = np.asarray(listed)
            whole = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
            if whole and labels.min() >= 0 and labels.max() <= LARGEST_LABEL:
                return labels.astype(np.int64)
    return None


def _array_to_tensor(array: np.ndarray, location: str) -> Tensor:
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise UserError(f"{location} has the type {array.dtype}; an image is uint8, uint16, or float in [0, 1].")
    if array.dtype == np.uint16:
        array = np.asarray(array / np.float32(65535), dtype=np.float32)
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
