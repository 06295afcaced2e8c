"""Features of all images of a data source, extracted once and cached."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Integral
from pathlib import Path

import numpy as np
import PIL
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from crate_mae.data import BadImage, ImageSource, readable_batches
from crate_mae.data.base import none_readable, refuse_unreadable
from crate_mae.data.dataset import default_workers
from crate_mae.data.files import cache_folder, whole_file
from crate_mae.data.numbers import MAX_BAD, MOST_THREADS, describe_not_share, describe_not_whole, is_number
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.models.devices import fastest_device
from crate_mae.models.features import (
    DEFAULT_LAYER,
    Pooling,
    check_pooling,
    default_pooling,
    depth,
    encode_layers,
    evaluating,
    layer_number,
)

logger = logging.getLogger(__name__)

AFFORDABLE = "affordable"
_DIGEST = "sha256"
_FEW_IMAGES = 2000  # up to which processes take longer to start than they save
_VERSIONS = (version("crate-mae"), PIL.__version__, torch.__version__)  # of what prepares images, and of what computes
# About 14 times the features of CIFAR-10 at a width of 2 x 384. What has not been used for longest goes first.
MOST_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the readable images of a source, in its order.

    Attributes:
        values: one row per image; with pooling "tokens", one matrix per image.
        labels: of the same images, or None.
        classes: names of the classes, or None.
        locations: where each image is.
        bad: the images that could not be read, which are left out.
        name: of the source.
        layer: index of the layer, from 0.
        pooling: how tokens were pooled to features.
        is_only_layer: whether no other layer was extracted with it.
    """

    values: Float[np.ndarray, "n f"] | Float[np.ndarray, "n t d"]
    labels: Int[np.ndarray, "n"] | None
    classes: list[str] | None
    locations: list[str]
    bad: tuple[BadImage, ...]
    name: str
    layer: int
    pooling: Pooling
    is_only_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How to extract features.

    Attributes:
        layers: of the encoder, from 0 or negative from the end; "all" for each of them; for probes also "affordable",
            all if their features are few (`probing.MOST_NUMBERS`), else the last.
        pooling: see `models.features.pool`; by default as fits the backbone.
        batch_size: number of images encoded at once.
        workers: processes that read images; by default one less than there are cores, at most 8, or none for few
            images.
        max_bad: largest share of unreadable images.
        cache: whether to read features from the user's cache, and to write them to it.
        on_images: called with the number of images of each batch, for a progress bar.
    """

    layers: Sequence[int] | str = (DEFAULT_LAYER,)
    pooling: Pooling | None = None
    batch_size: int = 256
    workers: int | None = None
    max_bad: float = MAX_BAD
    cache: bool = True
    on_images: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        mistakes = [describe_not_whole("--batch-size", self.batch_size), describe_not_share("--max-bad", self.max_bad)]
        if self.workers is not None:
            mistakes.append(describe_not_whole("--workers", self.workers, 0, MOST_THREADS))
        layers = () if self.layers in ("all", AFFORDABLE) else self.layers
        if isinstance(layers, str) or not all(is_number(each, -math.inf, math.inf, Integral) for each in layers):
            mistakes.append(f'--layer is {layers!r}, but must be a whole number or "all".')
        if found := [mistake for mistake in mistakes if mistake]:
            raise UserError("\n".join(found))

    def layer_numbers(self, backbone: Backbone) -> list[int]:
        """Indices of the requested layers of a backbone, from 0.

        Raises:
            UserError: for a layer that does not exist.
        """
        if isinstance(self.layers, str):
            return list(range(depth(backbone.encoder)))
        return [layer_number(backbone.encoder, layer) for layer in self.layers]

    def pooling_of(self, backbone: Backbone) -> Pooling:
        """The pooling for a backbone.

        Raises:
            UserError: for a pooling that the backbone does not support.
        """
        pooling = self.pooling or default_pooling(backbone.encoder)
        check_pooling(backbone.encoder, pooling)
        return pooling


def extract(backbone: Backbone, source: ImageSource, extraction: Extraction) -> list[Features]:
    """Extract the features of every readable image of a source, from each requested layer, in one pass.

    All features are held in memory: images x f x 4 bytes per layer. Only pooled features are cached (tokens would fill
    the cache), and only if every image could be read (so that unreadable images are reported every time).

    Raises:
        UserError: if too many images cannot be read, or features are not finite.
    """
    layers, pooling = extraction.layer_numbers(backbone), extraction.pooling_of(backbone)
    cache = FeatureCache(backbone, source, pooling) if extraction.cache and pooling != "tokens" else None
    found = {layer: values for layer in layers if cache and (values := cache.read(layer)) is not None}
    missing = [layer for layer in layers if layer not in found]
    indices, bad = np.arange(len(source)), []
    if missing:
        indices, values, bad = _extract(backbone, source, missing, pooling, extraction)
        found.update(zip(missing, values, strict=True))
        if cache and not bad:
            for layer in missing:
                cache.write(layer, found[layer])
    labels = source.labels
    return [
        Features(
            values=found[layer],
            labels=None if labels is None else labels[indices],
            classes=source.classes,
            locations=[source.location(int(i)) for i in indices],
            bad=tuple(bad),
            name=source.name,
            layer=layer,
            pooling=pooling,
            is_only_layer=len(layers) == 1,
        )
        for layer in layers
    ]


def _extract(
    backbone: Backbone, source: ImageSource, layers: Sequence[int], pooling: Pooling, extraction: Extraction
) -> tuple[Int[np.ndarray, "n"], list[np.ndarray], list[BadImage]]:
    """The numbers of the readable images, their features from each layer in float32, and the unreadable images."""
    encoder, total = backbone.encoder, len(source)
    if not backbone.is_borrowed:
        encoder.to(fastest_device())
    place = next((each for each in encoder.parameters() if each.is_floating_point()), torch.empty(0))
    workers = extraction.workers
    if workers is None:
        workers = 0 if total < _FEW_IMAGES else default_workers()
    indices = np.empty(total, dtype=np.int64)
    arrays: list[np.ndarray] = []  # of all images, allocated once
    bad: list[BadImage] = []
    stop = 0
    for batch in readable_batches(source, backbone.transform(), extraction.batch_size, workers=workers):
        bad += batch.bad
        refuse_unreadable(source, bad, extraction.max_bad)
        if len(batch.indices):
            start, stop = stop, stop + len(batch.indices)
            indices[start:stop] = batch.indices
            with evaluating(encoder):
                features = encode_layers(encoder, batch.images.to(place.device, place.dtype), layers, pooling)
            values = [layer.float().cpu().numpy() for layer in features]
            _check_finite(values, indices[start:stop], source, backbone)
            arrays = arrays or [np.empty((total, *each.shape[1:]), dtype=np.float32) for each in values]
            for array, each in zip(arrays, values, strict=True):
                array[start:stop] = each
        if extraction.on_images is not None:
            extraction.on_images(len(batch.indices) + len(batch.bad))
    if not stop:
        raise none_readable(f"None of {total} images", bad[0])
    return indices[:stop], [array[:stop] for array in arrays], bad


def _check_finite(values: list[np.ndarray], indices: np.ndarray, source: ImageSource, backbone: Backbone) -> None:
    for layer in values:
        finite = np.isfinite(layer.reshape(len(layer), -1)).all(axis=1)
        if not finite.all():
            first = source.location(int(indices[np.argmin(finite)]))
            raise UserError(
                f"{backbone.name} gives features that are not finite numbers, first for {first}.\n"
                "Its weights contain NaN, or values overflow: use an earlier checkpoint of the run."
            )


class FeatureCache:
    """The cached pooled features of one data source by one backbone: a file per layer in the user's cache folder.

    The name of a file is a digest of the weights, the architecture, the preparation of images, versions, and the
    names, sizes, modification times and some bytes of the data. Data and networks that only exist in Python have no
    such digest and are not cached. The cache is only for speed: a file that cannot be read or written is ignored, and
    so is one without the digest that was written with it, which is damaged: its features are extracted again.

    Args:
        backbone: whose features are cached.
        source: of the images.
        pooling: how tokens are pooled to features.
    """

    def __init__(self, backbone: Backbone, source: ImageSource, pooling: Pooling) -> None:
        data = source.fingerprint()
        weights = backbone.fingerprint() if data is not None else None
        self._key = None if weights is None else [*_VERSIONS, weights, data, pooling]
        self._images = len(source)

    def read(self, layer: int) -> np.ndarray | None:
        """The features of a layer, images x f; None if they are not cached."""
        path = self._path(layer)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                values, digest = file.get_tensor("features"), (file.metadata() or {}).get(_DIGEST)
            path.touch()  # the time of last use
        except (OSError, SafetensorError, ValueError, TypeError):
            digest = values = None
        if values is None or digest != _digest(values) or values.shape[:1] != (self._images,) or values.ndim != 2:
            logger.warning("Cached features are damaged and are extracted again: %s", path)
            return None
        return values

    def write(self, layer: int, values: np.ndarray) -> None:
        """Cache the features of a layer, and remove the least recently used files if they exceed the limit."""
        path = self._path(layer)
        if path is None or values.nbytes > MOST_BYTES:
            return
        with contextlib.suppress(UserError, OSError, SafetensorError):
            with whole_file(path) as temporary:
                values = np.ascontiguousarray(values)
                save_file({"features": values}, temporary, metadata={_DIGEST: _digest(values)})
            _make_room(path.parent)

    def _path(self, layer: int) -> Path | None:
        if self._key is None:
            return None
        digest = hashlib.sha256(json.dumps([*self._key, layer]).encode()).hexdigest()[:32]
        return cache_folder() / "features" / f"{digest}.safetensors"


def _digest(values: np.ndarray) -> str:
    """A digest of an array: of its numbers, their type and its shape."""
    digest = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _make_room(folder: Path) -> None:
    """Remove the least recently used files until the rest fits."""
    files = sorted(((file.stat(), file) for file in folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime_ns)
    total = sum(status.st_size for status, _ in files)
    for status, file in files:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size
