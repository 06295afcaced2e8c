"""Features extracted once for the same weights, data, layer and preparation, in the user's cache folder."""

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from crate_mae.data import ImageSource
from crate_mae.data.files import cache_folder, whole_file
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.models.features import Pooling

_VERSIONS = (version("crate-mae"), torch.__version__)  # of what prepares images, and of what computes
# About 14 times the features of CIFAR-10 at a width of 2 x 384. What has not been used for longest goes first.
MOST_BYTES = 4 * 2**30


class FeatureCache:
    """Pooled features of one data source by one backbone, a file a layer.

    The name of a file is a digest of the weights, the architecture, the preparation of images, versions, and the
    paths, sizes and modification times of the data. Data or networks that only Python knows have no such digest, and
    nothing is kept for them. The cache is only for speed: a file that is damaged, or cannot be read or written, is done
    without.

    Args:
        backbone: whose features.
        source: of which images.
        pooling: how tokens become features.
    """

    def __init__(self, backbone: Backbone, source: ImageSource, pooling: Pooling) -> None:
        data = source.fingerprint()
        weights = backbone.fingerprint() if data is not None else None
        self._key = None if weights is None else [*_VERSIONS, weights, data, pooling]
        self._images = len(source)

    def read(self, layer: int) -> np.ndarray | None:
        """The features of a layer, images x f, or None."""
        path = self._path(layer)
        if path is None:
            return None
        try:
            values = load_file(path)["features"]
            path.touch()  # used last
        except (OSError, SafetensorError, KeyError):
            return None
        return values if values.ndim == 2 and values.shape[0] == self._images else None

    def write(self, layer: int, values: np.ndarray) -> None:
        """Keep the features of a layer; what was used longest ago makes room."""
        path = self._path(layer)
        if path is None or values.nbytes > MOST_BYTES:
            return
        with contextlib.suppress(UserError, OSError, SafetensorError):
            with whole_file(path) as temporary:
                save_file({"features": np.ascontiguousarray(values)}, temporary)
            _make_room(path.parent)

    def _path(self, layer: int) -> Path | None:
        if self._key is None:
            return None
        digest = hashlib.sha256(json.dumps([*self._key, layer]).encode()).hexdigest()[:32]
        return cache_folder() / "features" / f"{digest}.safetensors"


def _make_room(folder: Path) -> None:
    """Remove what was used longest ago until the rest fits."""
    files = sorted(((file.stat(), file) for file in folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime_ns)
    total = sum(status.st_size for status, _ in files)
    for status, file in files:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size
