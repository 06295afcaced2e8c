"""Files of features for other programs, each written completely or not at all."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file
from sklearn.preprocessing import normalize

from crate_mae.data.files import whole_file
from crate_mae.errors import UserError
from crate_mae.evaluation.extract import Features

_ROWS = 1000


def check_feature_file(path: Path, pooling: str | None) -> None:
    """Raise a `UserError` if a file of this name cannot hold features, or not unpooled ones."""
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"--out {path} must end in one of {' '.join(_WRITERS)}.")
    if pooling == "tokens" and path.suffix.lower() == ".csv":
        raise UserError(
            f"{path} has one row per image, which cannot hold its tokens: use .parquet, .npz or another format."
        )


def write_features(features: Features, path: Path) -> None:
    """Write features in the format given by the file's suffix; `commands.embed.embed` describes the formats.

    Raises:
        UserError: if the file cannot be written.
    """
    with whole_file(path) as temporary:
        _WRITERS[path.suffix.lower()](features, temporary)


def unit_length(values: np.ndarray) -> np.ndarray:
    """Features, or each of their tokens, scaled to Euclidean length 1; zeros stay zeros."""
    return np.asarray(normalize(values.reshape(-1, values.shape[-1]))).reshape(values.shape)


def _write_parquet(features: Features, path: Path) -> None:
    size = features.values.shape[-1]
    kind = pa.list_(pa.float32(), size)
    if features.values.ndim == 3:
        kind = pa.list_(kind, features.values.shape[1])
    columns = _columns(features)
    kinds = {name: pa.int64() if name == "label" else pa.string() for name in columns}
    schema = pa.schema([*kinds.items(), ("feature", kind)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(features.values), _ROWS):
            rows = slice(start, start + _ROWS)
            arrays = [pa.array(column[rows], kinds[name]) for name, column in columns.items()]
            values: pa.Array = pa.array(features.values[rows].reshape(-1))
            for length in reversed(features.values.shape[1:]):
                values = pa.FixedSizeListArray.from_arrays(values, length)
            writer.write_table(pa.Table.from_arrays([*arrays, values], schema=schema))


def _write_csv(features: Features, path: Path) -> None:
    columns = _columns(features)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(f"f{i}" for i in range(features.values.shape[1]))])
        for *cells, values in zip(*columns.values(), features.values, strict=True):
            writer.writerow([*cells, *values])


def _write_npy(features: Features, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, features.values)


def _write_npz(features: Features, path: Path) -> None:
    arrays: dict[str, Any] = {"features": features.values, "files": np.array(features.locations)}
    if features.labels is not None:
        arrays["labels"] = features.labels
    if features.classes is not None:
        arrays["classes"] = np.array(features.classes)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _write_safetensors(features: Features, path: Path) -> None:
    arrays = {"features": np.ascontiguousarray(features.values)}
    if features.labels is not None:
        arrays["labels"] = features.labels
    texts = {"files": features.locations} | ({} if features.classes is None else {"classes": features.classes})
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata={name: json.dumps(text) for name, text in texts.items()})
    path.chmod(mode)  # safetensors creates files that only their owner can read


def _columns(features: Features) -> dict[str, list]:
    """The columns of a table besides the features: file, and label and class where they are known."""
    columns: dict[str, list] = {"file": features.locations}
    if features.labels is not None:
        columns["label"] = features.labels.tolist()
        if features.classes is not None:
            columns["class"] = [features.classes[label] for label in features.labels]
    return columns


_WRITERS: dict[str, Callable[[Features, Path], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".safetensors": _write_safetensors,
}
