"""Images in parquet files, in the layout of Hugging Face datasets or with a plain binary column."""

import bisect
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from crate_mae.data.base import EncodedSource, number_labels, printable
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.documents import parse_json
from crate_mae.data.files import files_fingerprint
from crate_mae.errors import UserError, first_line

logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "bytes")
_LABEL_NAMES = ("label", "labels", "class", "target", "cls", "fine_label")

# Row groups of image files are mostly 1 to 50 MB: room for a few of them, or all of CIFAR-10.
_CACHE_BYTES = 256 * 2**20
_MOST_GROUP_BYTES = 2**31
_ROWS_AT_ONCE = 16  # one at a time would take three times as long, many could take much memory
_FINGERPRINT_BLOCKS = 64


class ParquetSource(EncodedSource):
    """The rows of one or more parquet files, read by row group with a cache of 256 MB per process.

    In shuffled order over files larger than the cache, each image requires reading its row group; such files should
    be written with small row groups (the `datasets` library writes 100 rows).
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths = list(paths)
        files = [_File(path) for path in self._paths]
        first = files[0]
        self._column = first.image_column
        for file in files[1:]:
            if self._column not in file.schema.names:
                raise UserError(f'{file.name} has no column "{self._column}", unlike {first.name}.')
        self._groups = [(number, group) for number, file in enumerate(files) for group in range(len(file.groups))]
        self._group_starts = [0, *accumulate(rows for file in files for rows in file.groups)]
        self._file_starts = [0, *accumulate(sum(file.groups) for file in files)]
        if not self._group_starts[-1]:
            raise UserError(f"{name} has no rows.")
        super().__init__(name, *_labels_of(files))
        self._cache: OrderedDict[int, pa.Array | pa.ChunkedArray] = OrderedDict()

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
        try:
            content = rows[i - self._group_starts[group]].as_py()
        except Exception as error:  # fewer rows than the file said, or values that its type cannot have
            raise UnreadableImage(self.location(i), f"the row cannot be read ({first_line(error)})") from error
        if not isinstance(content, bytes):
            raise UnreadableImage(self.location(i), "the row holds no image bytes")
        return content

    def location(self, i: int) -> str:
        """File and row of image i, counted from 0 in that file."""
        number = bisect.bisect_right(self._file_starts, i) - 1
        return f"{printable(self._paths[number])} row {i - self._file_starts[number]}"

    def origins(self) -> Iterator[str]:
        """Files and rows."""
        for path, (start, stop) in zip(self._paths, pairwise(self._file_starts), strict=True):
            name = os.path.realpath(path)
            yield from (f"{name} row {row}" for row in range(stop - start))

    def fingerprint(self) -> str | None:
        """Of the files."""
        return files_fingerprint(((path.name, path) for path in self._paths), _FINGERPRINT_BLOCKS)

    def _load(self, group: int, i: int) -> pa.Array | pa.ChunkedArray:
        number, local = self._groups[group]
        try:
            # Opened each time, so that processes share no file position; single-threaded, since workers are parallel.
            with pq.ParquetFile(self._paths[number]) as file:
                rows = _images_of(file, local, self._column)
        except Exception as error:  # pyarrow raises nearly any type on a damaged file
            raise UnreadableImage(self.location(i), f"its row group cannot be read ({first_line(error)})") from error
        self._cache[group] = rows
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return rows


def _images_of(file: pq.ParquetFile, group: int, column: str) -> pa.Array | pa.ChunkedArray:
    """The encoded images of a row group.

    They are counted while they are read, since the sizes in the index of a file may be wrong, and a file of a few
    bytes may repeat a value of its dictionary in every row. The sizes in the pages themselves are checked by pyarrow.

    Raises:
        ValueError: if they are larger than what is read at once.
    """
    size = file.metadata.row_group(group).total_byte_size
    chunks: list[pa.Array] = []
    if size <= _MOST_GROUP_BYTES:
        size = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
            values = batch.column(0)
            chunks.append(values.field("bytes") if pa.types.is_struct(values.type) else values)
            size += chunks[-1].nbytes
            if size > _MOST_GROUP_BYTES:
                break
    if size > _MOST_GROUP_BYTES:
        raise ValueError(f"{size:,} bytes or more are more than the {_MOST_GROUP_BYTES:,} that are read at once")
    return pa.concat_arrays(chunks) if size <= _CACHE_BYTES else pa.chunked_array(chunks)


def _values_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column as Python objects; one that is repeated by a dictionary is made once."""
    values: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            known = [*chunk.dictionary.to_pylist(), None]
            values += [known[-1 if i is None else i] for i in chunk.indices.to_pylist()]
        else:
            values += chunk.to_pylist()
    return values


class _File:
    """What the index of a parquet file says, and its column of labels.

    Attributes:
        name: for messages.
        schema: names and types of the columns.
        groups: number of rows of each row group.
        image_column: name of the column of encoded images.
        label_column: name of the column of labels, or None.
        labels: as they were found; empty without a column of labels.
        classes: names of the classes that are stored beside the rows, or None.
    """

    def __init__(self, path: Path) -> None:
        self.name = printable(path)
        try:
            if not path.is_file():
                raise OSError("it is not a regular file")
            with pq.ParquetFile(path) as file:
                self.schema = file.schema_arrow
                self.groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                features = _features(self.schema, self.name)
                self.image_column = _image_column(self.schema, features, path)
                self.label_column = _label_column(self.schema, features)
                column = self.label_column
            # As a dictionary, since a file of a few bytes may repeat a long name in every row.
            with pq.ParquetFile(path, read_dictionary=[] if column is None else [column]) as file:
                self.labels = [] if column is None else _values_of(file.read(columns=[column]).column(0))
        except UserError:
            raise
        except Exception as error:  # pyarrow raises nearly any type on a damaged file
            raise UserError(f"Cannot read {self.name} as a parquet file: {first_line(error)}") from error
        self.classes = None if column is None else _class_names(features.get(column, {}), column, self.name)


def image_column(candidates: Sequence[str]) -> str:
    """The column of images among those that could be: one with a usual name, otherwise the first."""
    return next((name for name in _IMAGE_NAMES if name in candidates), candidates[0])


def label_column(candidates: Sequence[str], declared: Sequence[str]) -> str | None:
    """The column of labels among those that could be: one that is declared as such or has a usual name, best both."""
    named = [name for name in _LABEL_NAMES if name in candidates]
    return next(iter([*(name for name in named if name in declared), *declared, *named]), None)


def _labels_of(files: Sequence[_File]) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    """Labels of all rows, and class names. Files that number the same classes differently are brought together."""
    first = files[0]
    for file in files:
        if file.label_column != first.label_column or (file.classes is None) != (first.classes is None):
            described = [f"{_described(other)} in {other.name}" for other in (first, file)]
            raise UserError(
                f"The files have different labels: {', '.join(described)}.\n"
                "Give all files the same columns and metadata, or open them one by one."
            )
    if first.classes is None or all(file.classes == first.classes for file in files):
        labels, classes = number_labels([label for file in files for label in file.labels])
        return labels, classes if first.classes is None or labels is None else first.classes
    named = [_names_of(file) for file in files]
    labels, _ = number_labels([name for names in named for name in names])
    if labels is None:
        return None, None
    classes = list(dict.fromkeys(known for file in files for known in file.classes or ()))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for names in named for name in names if name is not None], dtype=np.int64), classes


def _names_of(file: _File) -> list[str | None]:
    """The class of each row by its name; None where a row has no label."""
    classes = file.classes or []
    if any(isinstance(label, int) and label >= len(classes) for label in file.labels):
        raise UserError(f"{file.name} has the label {max(file.labels)}, but names for {len(classes)} classes only.")
    return [classes[label] if isinstance(label, int) and label >= 0 else None for label in file.labels]


def _described(file: _File) -> str:
    if file.label_column is None:
        return "no column of labels"
    return f'"{file.label_column}" {"without" if file.classes is None else "with"} class names'


def _features(schema: pa.Schema, name: str) -> dict[str, dict[str, Any]]:
    """Return the column descriptions that the `datasets` library stores in a file; empty if there are none."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    try:
        features = parse_json(stored, f"{name}: its metadata")["info"]["features"]
        return {column: feature for column, feature in features.items() if isinstance(feature, dict)}
    except (UserError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: column types and class names in its metadata are not understood (%s)", name, error)
        return {}


def _class_names(feature: dict[str, Any], column: str, name: str) -> list[str] | None:
    """Return the class names in the description of a column; None if there are none."""
    names = feature.get("names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(known, (str, int)) for known in names):
        raise UserError(
            f'{name}: the class names of the column "{column}" in its metadata are not a list of names, but '
            f"{str(names)[:60]}.\nWrite the file again, with ClassLabel(names=[...]) of the datasets library."
        )
    return [str(known) for known in names]


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
    return image_column(candidates)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str | None:
    able = [field.name for field in schema if _holds_labels(field.type)]
    declared = [name for name in able if features.get(name, {}).get("_type") == "ClassLabel"]
    return label_column(able, declared)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a categorical column of pandas
        return _holds_labels(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
