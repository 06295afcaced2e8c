"""Tables with a column of encoded images: parquet files, and data sets of the Hugging Face Hub or saved by its library.

The columns are those of Hugging Face's layout, or plain ones: bytes, and numbers or names of classes.
"""

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

from crate_mae.data.base import EncodedSource, number_labels, path_text, read_file, refuse_unnamed
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.documents import parse_json
from crate_mae.data.files import files_fingerprint
from crate_mae.errors import UserError, first_line, install_command

logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "bytes")
_LABEL_NAMES = ("label", "labels", "class", "target", "cls", "fine_label")
_NO_IMAGE = "the row holds no image bytes"

# Row groups of image files are mostly 1 to 50 MB: room for a few of them, or all of CIFAR-10.
_CACHE_BYTES = 256 * 2**20
_MOST_GROUP_BYTES = 2**31
_ROWS_AT_ONCE = 16  # one at a time would take three times as long, many could take much memory


class ParquetSource(EncodedSource):
    """The rows of one or more parquet files, read by row group with a cache of 256 MB per process.

    In shuffled order over files larger than the cache, each image requires reading its row group; such files should
    be written with small row groups (the `datasets` library writes 100 rows).
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths = list(paths)
        files = [_File(path) for path in self._paths]
        self._column = files[0].image_column
        for file in files[1:]:
            if self._column not in file.schema.names:
                raise UserError(f'{file.name} has no column "{self._column}", unlike {files[0].name}.')
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
        if group not in self._cache:
            self._load(group, i)
        self._cache.move_to_end(group)
        try:
            content = self._cache[group][i - self._group_starts[group]].as_py()
        except Exception as error:  # fewer rows than the file said, or values that its type cannot have
            raise UnreadableImage(self.location(i), f"the row cannot be read ({first_line(error)})") from error
        if not isinstance(content, bytes):
            raise UnreadableImage(self.location(i), _NO_IMAGE)
        return content

    def location(self, i: int) -> str:
        """File and row of image i, counted from 0 in that file."""
        number = bisect.bisect_right(self._file_starts, i) - 1
        return f"{path_text(self._paths[number])} row {i - self._file_starts[number]}"

    def origins(self) -> Iterator[str]:
        """Files and rows."""
        for path, (start, stop) in zip(self._paths, pairwise(self._file_starts), strict=True):
            name = os.path.realpath(path)
            yield from (f"{name} row {row}" for row in range(stop - start))

    def fingerprint(self) -> str | None:
        """Of the files."""
        return files_fingerprint((path.name, path) for path in self._paths)

    def _load(self, group: int, i: int) -> None:
        """Read a row group, in which image i is, into the cache."""
        number, local = self._groups[group]
        try:
            # Opened each time, so that processes share no file position; single-threaded, since workers are parallel.
            with pq.ParquetFile(self._paths[number]) as file:
                self._cache[group] = _images_of(file, local, self._column)
        except Exception as error:  # pyarrow raises nearly any type on a damaged file
            raise UnreadableImage(self.location(i), f"its row group cannot be read ({first_line(error)})") from error
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)


def _images_of(file: pq.ParquetFile, group: int, column: str) -> pa.Array | pa.ChunkedArray:
    """The encoded images of a row group; a `ValueError` if they are larger than what is read at once.

    They are counted while they are read, since the sizes in the index of a file may be wrong, and a file of a few
    bytes may repeat a value of its dictionary in every row. The sizes in the pages themselves are checked by pyarrow.
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


class _File:
    """The index of a parquet file, and its column of labels.

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
        self.name = path_text(path)
        self.labels: list[Any] = []
        self.classes: list[str] | None = None
        try:
            if not path.is_file():
                raise OSError("it is not a regular file")
            with pq.ParquetFile(path) as file:
                self.schema = file.schema_arrow
                self.groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            features = self._features()
            self.image_column = _image_column(self._image_columns(features))
            able = [field.name for field in self.schema if _holds_labels(field.type)]
            declared = [name for name in able if features.get(name, {}).get("_type") == "ClassLabel"]
            self.label_column = column = _label_column(able, declared)
            if column is not None:
                # As a dictionary, since a file of a few bytes may repeat a long name in every row.
                with pq.ParquetFile(path, read_dictionary=[column]) as file:
                    self.labels = _values_of(file.read(columns=[column]).column(0))
                self.classes = self._class_names(features.get(column, {}).get("names"))
        except UserError:
            raise
        except Exception as error:  # pyarrow raises nearly any type on a damaged file
            raise UserError(f"Cannot read {self.name} as a parquet file: {first_line(error)}") from error

    def _features(self) -> dict[str, dict[str, Any]]:
        """The column descriptions that the `datasets` library stores in a file; empty if there are none."""
        stored = (self.schema.metadata or {}).get(b"huggingface")
        if stored is None:
            return {}
        try:
            features = parse_json(stored, f"{self.name}: its metadata")["info"]["features"]
            return {column: feature for column, feature in features.items() if isinstance(feature, dict)}
        except (UserError, KeyError, TypeError, AttributeError) as error:
            reason = "%s: column types and class names in its metadata are not understood (%s)"
            logger.warning(reason, self.name, error)
            return {}

    def _image_columns(self, features: dict[str, dict[str, Any]]) -> list[str]:
        able = [field.name for field in self.schema if _holds_bytes(field.type)]
        if not able:
            columns = ", ".join(f"{field.name} ({field.type})" for field in self.schema)
            raise UserError(
                f"{self.name} has no column of encoded images: neither bytes nor a struct with bytes.\n"
                f"Its columns: {columns}."
            )
        return [name for name in able if features.get(name, {}).get("_type") == "Image"] or able

    def _class_names(self, names: Any) -> list[str] | None:
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(known, (str, int)) for known in names):
            raise UserError(
                f'{self.name}: the class names of the column "{self.label_column}" in its metadata are not a list of '
                f"names, but {str(names)[:60]}.\n"
                "Write the file again, with ClassLabel(names=[...]) of the datasets library."
            )
        return [str(known) for known in names]

    def described_labels(self) -> str:
        """Where the labels are, for messages."""
        if self.label_column is None:
            return f"no column of labels in {self.name}"
        return f'"{self.label_column}" {"without" if self.classes is None else "with"} class names in {self.name}'

    def named_labels(self) -> list[str | None]:
        """The class of each row by its name; None where a row has no label."""
        classes = self.classes or []
        refuse_unnamed(self.name, max((label for label in self.labels if isinstance(label, int)), default=-1), classes)
        return [classes[label] if isinstance(label, int) and label >= 0 else None for label in self.labels]


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


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a categorical column of pandas
        return _holds_labels(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _image_column(candidates: Sequence[str]) -> str:
    """The column of images among those that could be: one with a usual name, otherwise the first."""
    return next((name for name in _IMAGE_NAMES if name in candidates), candidates[0])


def _label_column(candidates: Sequence[str], declared: Sequence[str]) -> str | None:
    """The column of labels among those that could be: one that is declared as such or has a usual name, best both."""
    named = [name for name in _LABEL_NAMES if name in candidates]
    return next(iter([*(name for name in named if name in declared), *declared, *named]), None)


def _labels_of(files: Sequence[_File]) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    """Labels of all rows, and class names. Files that number the same classes differently are brought together."""
    first = files[0]
    for file in files:
        if file.label_column != first.label_column or (file.classes is None) != (first.classes is None):
            raise UserError(
                f"The files have different labels: {first.described_labels()}, {file.described_labels()}.\n"
                "Give all files the same columns and metadata, or open them one by one."
            )
    if all(file.classes == first.classes for file in files):
        labels, classes = number_labels([label for file in files for label in file.labels])
        return labels, classes if first.classes is None or labels is None else first.classes
    names = [name for file in files for name in file.named_labels()]
    if not names or None in names:
        return None, None
    number = {name: i for i, name in enumerate(dict.fromkeys(known for file in files for known in file.classes or ()))}
    return np.array([number[name] for name in names if name is not None], dtype=np.int64), list(number)


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
        self._column = _image_column(images)
        self._rows = dataset.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        declared = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
        labels = classes = None
        if (column := _label_column(dataset.column_names, declared)) is not None:
            table = dataset.select_columns([column]).with_format("arrow")[:]
            labels, classes = number_labels(table.column(column).to_pylist())
            if labels is not None and column in declared:
                classes = dataset.features[column].names
        super().__init__(full_name, labels, classes)

    def __len__(self) -> int:
        return len(self._rows)

    def content(self, i: int) -> bytes:
        """The encoded image of row i."""
        item = self._rows[i][self._column] or {}
        if item.get("bytes") is not None:
            return item["bytes"]
        if item.get("path"):
            return read_file(Path(item["path"]), self.location(i))
        raise UnreadableImage(self.location(i), _NO_IMAGE)

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
