"""Features for search and for other programs: whitened, scaled to length 1, and written to files.

Features of masked autoencoders often point almost the same way, so that all cosines are near 1 and a search by cosine
tells little apart. Whitening takes away what all images share, and gives all directions the same weight. The transform
is fitted on some images, is saved, and is applied to queries as well. Files are written completely or not at all.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import normalize

from crate_mae.data.documents import parse_json
from crate_mae.data.files import whole_file
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Features
from crate_mae.models.features import mean_cosine

_ALIKE = 0.9  # mean cosine from which features are said to point the same way
_ROWS = 1000


def describe_alike(features: Features) -> str:
    """A hint, if the features of different images point almost the same way; otherwise empty."""
    cosine = mean_cosine(torch.from_numpy(features.values)) if features.values.ndim == 2 else 0.0
    if cosine <= _ALIKE:
        return ""
    return (
        f"The mean cosine between images is {cosine:.2f}: features point almost the same way. For a search by cosine, "
        "whiten them: `crate-mae embed ... --whiten FILE`."
    )


@dataclass(frozen=True)
class Whitening:
    r"""$x \mapsto \Sigma^{-1/2} (x - \mu)$, with the mean and the covariance of the features of some images.

    The covariance is that of Ledoit and Wolf (2004), which has an inverse for few images too.

    Attributes:
        mean: of the features.
        matrix: the inverse root of their covariance.
        source: what the features are of: weights, layer and pooling, which must be the same for queries.
    """

    mean: Float[np.ndarray, " f"]
    matrix: Float[np.ndarray, "f f"]
    source: dict[str, str]

    @classmethod
    def fitted(cls, features: Features, backbone: Backbone) -> "Whitening":
        """The whitening of some features.

        Raises:
            UserError: if they are too few, or all the same.
        """
        values = features.values.astype(np.float64)
        if len(values) < 2 or not np.ptp(values, axis=0).any():
            raise UserError(f"--whiten needs at least two different images to be fitted on, but got {len(values)}.")
        covariance, _ = ledoit_wolf(values)
        variances, directions = np.linalg.eigh(covariance)
        matrix = (directions / np.sqrt(variances)) @ directions.T
        mean = values.mean(axis=0)
        return cls(mean.astype(np.float32), matrix.astype(np.float32), _source_of(features, backbone))

    @classmethod
    def read(cls, path: Path) -> "Whitening":
        """A whitening from a file.

        Raises:
            UserError: if it is none.
        """
        try:
            with safe_open(path, framework="np") as file:
                source = parse_json((file.metadata() or {})["source"], "what it was fitted on")
                mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
            if not isinstance(source, dict) or mean.ndim != 1 or matrix.shape != mean.shape * 2:
                raise ValueError("it has other contents")
            return cls(mean, matrix, source)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"--whiten {path} is not a file that `crate-mae embed --whiten` has written.") from error

    def save(self, path: Path) -> None:
        """Write it to a file, completely or not at all."""
        with whole_file(path) as temporary:
            arrays = {"mean": self.mean, "matrix": np.ascontiguousarray(self.matrix)}
            save_file(arrays, temporary, metadata={"source": json.dumps(self.source)})

    def of(self, features: Features, backbone: Backbone) -> Features:
        """The whitened features.

        Raises:
            UserError: for features of other weights, another layer or another pooling.
        """
        other = {key: value for key, value in _source_of(features, backbone).items() if self.source.get(key) != value}
        if other:
            raise UserError(
                f"--whiten: the file was fitted on features with another {' and '.join(other)}.\nGive the same model, "
                "--layer and --pooling as then, or the name of a new file."
            )
        return replace(features, values=(features.values - self.mean) @ self.matrix)


def _source_of(features: Features, backbone: Backbone) -> dict[str, str]:
    """What features are of."""
    weights = backbone.fingerprint() or backbone.name
    return {"model": weights, "layer": str(features.layer), "pooling": features.pooling}


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
    save_file(arrays, path, metadata={name: json.dumps(text) for name, text in texts.items()})


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
