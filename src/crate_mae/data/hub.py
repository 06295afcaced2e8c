"""Data sets of the Hugging Face Hub, or of a local folder that the `datasets` library reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from crate_mae.data.base import EncodedSource, number_labels, read_file
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.parquet import IMAGE_NAMES, LABEL_NAMES
from crate_mae.errors import UserError, first_line, install_command


class HubSource(EncodedSource):
    """One split of a data set of the `datasets` library (extra `hub`), as encoded bytes that are decoded here."""

    def __init__(self, name: str, split: str | None) -> None:
        datasets = _import_datasets()
        full_name = f"hf:{name}{f':{split}' if split else ''}"
        dataset = _load(datasets, name, split, full_name)
        column = _image_column(dataset, datasets, full_name)
        labels, classes = _labels(dataset, datasets)
        super().__init__(full_name, labels, classes)
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


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"Data of the form hf:name needs the datasets library:\n    {install_command('hub')}"
        ) from error
    return datasets


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


def _image_column(dataset: Any, datasets: Any, full_name: str) -> str:
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise UserError(f"{full_name} has no image column; its columns: {', '.join(dataset.column_names)}.")
    return next((name for name in IMAGE_NAMES if name in found), found[0])


def _labels(dataset: Any, datasets: Any) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    declared = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in LABEL_NAMES if name in dataset.column_names]
    column = next(iter([*(name for name in named if name in declared), *declared, *named]), None)
    if column is None:
        return None, None
    table = dataset.select_columns([column]).with_format("arrow")[:]
    labels, classes = number_labels(table.column(column).to_pylist())
    if labels is not None and column in declared:
        classes = list(dataset.features[column].names)
    return labels, classes
