"""Data sets by name: digits, torchvision:NAME, and hf:NAME of the Hugging Face Hub or a folder for its library."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from jaxtyping import Int
from PIL import Image

from crate_mae.data.base import EncodedSource, ImageSource, number_labels, read_file
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.files import cache_folder
from crate_mae.data.parquet import image_column, label_column
from crate_mae.data.wrapped import DatasetSource
from crate_mae.errors import UserError, did_you_mean, first_line, install_command

_TEST_DIGITS = 297


class DigitsSource(ImageSource):
    """The 1,797 handwritten digits of scikit-learn, grey, 8 x 8; their values 0..16 are scaled to 0..255.

    The splits are defined here: in the order of a permutation with seed 0 the last 297 digits are `test`, the 1,500
    before them `train`. Without a split there are all 1,797, in scikit-learn's order.
    """

    def __init__(self, split: str | None = None) -> None:
        from sklearn.datasets import load_digits  # takes over a second to import

        digits: Any = load_digits()
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

    def read(self, i: int) -> Image.Image:
        """Digit i in mode L."""
        return Image.fromarray(self._images[i])

    def location(self, i: int) -> str:
        """The number of the digit in `load_digits`."""
        return f"digits row {self._rows[i]}"

    def origins(self) -> Iterator[str]:
        """Their numbers in `load_digits`."""
        return (self.location(i) for i in range(len(self)))

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
    settings = _split_settings(name, split, parameters.keys())
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


def _split_settings(name: str, split: str | None, parameters: Any) -> dict[str, Any]:
    if split is None:
        return {}
    if "split" in parameters:
        return {"split": split}
    if "train" in parameters and split in ("train", "test"):
        return {"train": split == "train"}
    choice = f"torchvision:{name}:train or torchvision:{name}:test" if "train" in parameters else f"torchvision:{name}"
    raise UserError(f'torchvision:{name} has no split "{split}": use {choice}.')


class HubSource(EncodedSource):
    """One split of a data set of the `datasets` library (extra `hub`), as encoded bytes that are decoded here."""

    def __init__(self, name: str, split: str | None) -> None:
        full_name = f"hf:{name}{f':{split}' if split else ''}"
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"Data of the form hf:name needs the datasets library:\n    {install_command('hub')}"
            ) from error
        dataset = _load(datasets, name, split, full_name)
        images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise UserError(f"{full_name} has no image column; its columns: {', '.join(dataset.column_names)}.")
        column = image_column(images)
        super().__init__(full_name, *_labels(dataset, datasets))
        self._rows = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._rows)

    def content(self, i: int) -> bytes:
        """The encoded image of row i."""
        item = self._rows[i][self._column] or {}
        if item.get("bytes") is not None:
            return item["bytes"]
        if item.get("path"):
            return read_file(Path(item["path"]), self.location(i))
        raise UnreadableImage(self.location(i), "the row holds no image bytes")

    def location(self, i: int) -> str:
        """Data set and row of image i."""
        return f"{self.name} row {i}"

    def origins(self) -> Iterator[str]:
        """The rows of what the `datasets` library gives the same fingerprint."""
        return (f"{self._rows._fingerprint} row {i}" for i in range(len(self)))

    def fingerprint(self) -> str | None:
        """The fingerprint of the `datasets` library: of its files and all operations on their rows."""
        return f"{self.name} {self._rows._fingerprint}"


def _load(datasets: Any, name: str, split: str | None, full_name: str) -> Any:
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # network, authorisation, unknown name, missing configuration
        raise UserError(f"Cannot open {full_name}: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        if split is not None:
            raise UserError(f"{full_name} was saved as one split: use hf:{name}.")
        return loaded
    chosen = split or ("train" if "train" in loaded or len(loaded) > 1 else next(iter(loaded)))
    if chosen not in loaded:
        choices = ", ".join(f"hf:{name}:{known}" for known in loaded)
        raise UserError(f'hf:{name} has no split "{chosen}": use {choices}.')
    return loaded[chosen]


def _labels(dataset: Any, datasets: Any) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    declared = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    column = label_column(dataset.column_names, declared)
    if column is None:
        return None, None
    table = dataset.select_columns([column]).with_format("arrow")[:]
    labels, classes = number_labels(table.column(column).to_pylist())
    if labels is not None and column in declared:
        classes = list(dataset.features[column].names)
    return labels, classes
