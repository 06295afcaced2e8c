"""Images in parquet files, in the layout of Hugging Face datasets or with a plain binary column."""

import bisect
import json
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from crate_mae.data.base import EncodedSource, files_fingerprint, number_labels, printable
from crate_mae.data.decode import UnreadableImage
from crate_mae.errors import UserError, first_line

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "bytes")
LABEL_NAMES = ("label", "labels", "class", "target", "cls", "fine_label")

# Row groups of image files are mostly 1 to 50 MB: room for a few of them, or all of CIFAR-10.
_CACHE_BYTES = 256 * 2**20


class ParquetSource(EncodedSource):
    """The rows of one or more parquet files, read by row group with a cache of 256 MB per process.

    In shuffled order over files larger than the cache, each image requires reading its row group; such files should
    be written with small row groups (the `datasets` library writes 100 rows).
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths = list(paths)
        files = [_open(path) for path in self._paths]
        schema = files[0].schema_arrow
        features = _features(schema)
        self._column = _image_column(schema, features, self._paths[0])
        for path, file in zip(self._paths, files, strict=True):
            if self._column not in file.schema_arrow.names:
                raise UserError(
                    f'{printable(path)} has no column "{self._column}", unlike {printable(self._paths[0])}.'
                )
        self._groups = [(number, group) for number, file in enumerate(files) for group in range(file.num_row_groups)]
        sizes = [files[number].metadata.row_group(group).num_rows for number, group in self._groups]
        self._group_starts = [0, *accumulate(sizes)]
        self._file_starts = [0, *accumulate(file.metadata.num_rows for file in files)]
        if not self._group_starts[-1]:
            raise UserError(f"{name} has no rows.")
        label_column = _label_column(schema, features)
        labels, classes = _read_labels(files, label_column)
        if labels is not None and label_column in features:
            classes = features[label_column].get("names", classes)
        super().__init__(name, labels, classes)
        self._cache: OrderedDict[int, pa.Array | pa.ChunkedArray] = OrderedDict()
        for file in files:
            file.close()

    def __len__(self) -> int:
        return self._group_starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def content(self, i: int) -> bytes:
        """The encoded image of row i."""
        group = bisect.bisect_right(self._group_starts, i) - 1
        rows = self._cache.get(group)
        if rows is None:
            rows = self._load(group, i)
        else:
            self._cache.move_to_end(group)
        content = rows[i - self._group_starts[group]].as_py()
        if content is None:
            raise UnreadableImage(self.location(i), "the row holds no image bytes")
        return content

    def location(self, i: int) -> str:
        """File and row of image i, counted from 0 in that file."""
        number = bisect.bisect_right(self._file_starts, i) - 1
        return f"{printable(self._paths[number])} row {i - self._file_starts[number]}"

    def fingerprint(self) -> str | None:
        """Of the files."""
        return files_fingerprint(self._paths)

    def _load(self, group: int, i: int) -> pa.Array | pa.ChunkedArray:
        number, local = self._groups[group]
        try:
            # Opened each time, so that processes share no file position; single-threaded, since workers are parallel.
            with pq.ParquetFile(self._paths[number]) as file:
                table = file.read_row_group(local, columns=[self._column], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UnreadableImage(self.location(i), f"its row group cannot be read ({first_line(error)})") from error
        struct = pa.types.is_struct(table.schema.field(0).type)
        column = table.flatten().column(f"{self._column}.bytes") if struct else table.column(0)
        rows = column.chunk(0) if column.num_chunks == 1 else column
        self._cache[group] = rows
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"Cannot read {printable(path)} as a parquet file: {first_line(error)}") from error


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the column descriptions that the `datasets` library stores in a file; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _image_column(schema: pa.Schema, features: dict[str, dict[str, Any]], path: Path) -> str:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    declared = [name for name in candidates if features.get(name, {}).get("_type") == "Image"]
    candidates = declared or candidates
    if not candidates:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"{printable(path)} has no column of encoded images: neither bytes nor a struct with bytes.\n"
            f"Its columns: {columns}."
        )
    return next((name for name in IMAGE_NAMES if name in candidates), candidates[0])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str | None:
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in schema.names and _holds_labels(schema.field(name).type)]
    return next(iter([*(name for name in named if name in declared), *declared, *named]), None)


def _holds_labels(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_labels(
    files: Sequence[pq.ParquetFile], column: str | None
) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    if column is None or not all(column in file.schema_arrow.names for file in files):
        return None, None
    found = [label for file in files for label in file.read(columns=[column]).column(0).to_pylist()]
    return number_labels(found)
