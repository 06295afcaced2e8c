"""Whitening of features: what all images share is taken away, and all directions get the same weight.

Features of masked autoencoders often point almost the same way, so that all cosines are near 1 and a search by cosine
tells little apart. The transform is fitted on some images, is saved, and is applied to queries as well.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.covariance import ledoit_wolf

from crate_mae.data.files import whole_file
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Features
from crate_mae.models.features import mean_cosine

ALIKE = 0.9  # mean cosine from which features are said to point the same way


def describe_alike(features: Features) -> str | None:
    """A hint, if the features of different images point almost the same way."""
    cosine = mean_cosine(torch.from_numpy(features.values)) if features.values.ndim == 2 else 0.0
    if cosine <= ALIKE:
        return None
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
        return cls(mean.astype(np.float32), matrix.astype(np.float32), source_of(features, backbone))

    @classmethod
    def read(cls, path: Path) -> "Whitening":
        """A whitening from a file.

        Raises:
            UserError: if it is none.
        """
        try:
            with safe_open(path, framework="np") as file:
                source = json.loads((file.metadata() or {})["source"])
                return cls(file.get_tensor("mean"), file.get_tensor("matrix"), source)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"--whiten {path} is not a file that `crate-mae embed --whiten` has written.") from error

    def save(self, path: Path) -> None:
        """Write it to a file, completely or not at all."""
        with whole_file(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            metadata = {"source": json.dumps(self.source)}
            save_file({"mean": self.mean, "matrix": np.ascontiguousarray(self.matrix)}, temporary, metadata=metadata)
            temporary.chmod(mode)  # safetensors creates files that only their owner can read

    def of(self, features: Features, backbone: Backbone) -> Features:
        """The whitened features.

        Raises:
            UserError: for features of other weights, another layer or another pooling.
        """
        other = {key: value for key, value in source_of(features, backbone).items() if self.source.get(key) != value}
        if other:
            raise UserError(
                f"--whiten: the file was fitted on features with another {' and '.join(other)}.\nGive the same model, "
                "--layer and --pooling as then, or the name of a new file."
            )
        return replace(features, values=(features.values - self.mean) @ self.matrix)


def source_of(features: Features, backbone: Backbone) -> dict[str, str]:
    """What features are of."""
    weights = backbone.fingerprint() or backbone.name
    return {"model": weights, "layer": str(features.layer), "pooling": features.pooling}
