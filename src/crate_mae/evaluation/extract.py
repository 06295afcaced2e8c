"""Features of all images of a data source."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from crate_mae.data import BadImage, ImageSource, readable_batches
from crate_mae.data.base import refuse_unreadable
from crate_mae.data.dataset import default_workers
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.cache import FeatureCache
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

# Until a source is larger, processes take longer to start than they save.
_FEW_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the readable images of a source, in its order.

    Attributes:
        values: one row an image; with "tokens", one matrix an image.
        labels: of the same images, or None.
        classes: names of the classes, or None.
        locations: where each image is.
        bad: the images that could not be read, and so are left out.
        name: of the source.
        layer: number of the layer, from 0.
        pooling: how tokens became features.
    """

    values: Float[np.ndarray, "n f"] | Float[np.ndarray, "n t d"]
    labels: Int[np.ndarray, "n"] | None
    classes: list[str] | None
    locations: list[str]
    bad: tuple[BadImage, ...]
    name: str
    layer: int
    pooling: Pooling


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How to extract features.

    Attributes:
        layers: of the encoder, from 0 or negative from the end; "all" for each of them.
        pooling: see `models.features.pool`; by default as the backbone needs.
        batch_size: images that are encoded at once.
        workers: processes that read images; by default one less than there are cores, at most 8, or none for few
            images.
        max_bad: largest share of unreadable images.
        cache: whether to take features from the user's cache, and to leave them there.
        on_images: told the number of images of each batch, for a progress bar.
    """

    layers: Sequence[int] | str = (DEFAULT_LAYER,)
    pooling: Pooling | None = None
    batch_size: int = 256
    workers: int | None = None
    max_bad: float = 0.01
    cache: bool = True
    on_images: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        mistakes = []
        if self.batch_size < 1:
            mistakes.append(f"--batch-size is {self.batch_size}, but must be at least 1.")
        if self.workers is not None and self.workers < 0:
            mistakes.append(f"--workers is {self.workers}, but must be at least 0.")
        if not 0.0 <= self.max_bad <= 1.0:
            mistakes.append(f"--max-bad is {self.max_bad}, but must be between 0 and 1.")
        if isinstance(self.layers, str) and self.layers != "all":
            mistakes.append(f'--layer is "{self.layers}", but must be a number or "all".')
        if mistakes:
            raise UserError("\n".join(mistakes))

    def layer_numbers(self, backbone: Backbone) -> list[int]:
        """Numbers from 0 of the wanted layers of a backbone.

        Raises:
            UserError: for one that does not exist.
        """
        if isinstance(self.layers, str):
            return list(range(depth(backbone.encoder)))
        return [layer_number(backbone.encoder, layer) for layer in self.layers]

    def pooling_of(self, backbone: Backbone) -> Pooling:
        """The pooling for a backbone.

        Raises:
            UserError: for one that it cannot have.
        """
        pooling = self.pooling or default_pooling(backbone.encoder)
        check_pooling(backbone.encoder, pooling)
        return pooling


class Batch(NamedTuple):
    """Features of the readable images of one batch.

    Attributes:
        indices: of the images in the source.
        values: for each layer, the features; none where no image of the batch can be read.
        bad: the unreadable images.
    """

    indices: Int[np.ndarray, "b"]
    values: list[np.ndarray]
    bad: tuple[BadImage, ...]


def extract(backbone: Backbone, source: ImageSource, extraction: Extraction) -> list[Features]:
    """Features of every readable image of a source, from each wanted layer, in one pass.

    All of them are held in memory: images x f x 4 bytes a layer. The cache keeps what is pooled (tokens would fill it)
    and complete (so that unreadable images are reported every time).

    Raises:
        UserError: if too many images cannot be read, or features are not finite.
    """
    layers, pooling = extraction.layer_numbers(backbone), extraction.pooling_of(backbone)
    cache = FeatureCache(backbone, source, pooling) if extraction.cache and pooling != "tokens" else None
    found = {layer: values for layer in layers if cache and (values := cache.read(layer)) is not None}
    missing = [layer for layer in layers if layer not in found]
    indices, bad = np.arange(len(source)), []
    if missing:
        batches = feature_batches(backbone, source, missing, pooling, extraction)
        indices, values, bad = _collect(batches, len(source))
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
        )
        for layer in layers
    ]


def feature_batches(
    backbone: Backbone, source: ImageSource, layers: Sequence[int], pooling: Pooling, extraction: Extraction
) -> Iterator[Batch]:
    """Features in float32, batch by batch in the order of the source.

    Raises:
        UserError: as soon as too many images cannot be read, or features are not finite.
    """
    encoder = backbone.encoder
    device = fastest_device()
    encoder.to(device)
    workers = _workers(extraction.workers, len(source))
    unreadable: list[BadImage] = []
    transform = backbone.transform()
    for batch in readable_batches(
        source, transform, extraction.batch_size, workers=workers, worker_init=_ignore_interrupts
    ):
        unreadable += batch.bad
        refuse_unreadable(source, unreadable, extraction.max_bad)
        indices = batch.indices.numpy()
        values: list[np.ndarray] = []
        if len(indices):
            with evaluating(encoder):
                features = encode_layers(encoder, batch.images.to(device), layers, pooling)
            values = [layer.float().cpu().numpy() for layer in features]
            _check_finite(values, indices, source, backbone)
        yield Batch(indices, values, batch.bad)
        if extraction.on_images is not None:
            extraction.on_images(len(indices) + len(batch.bad))


def _collect(batches: Iterator[Batch], total: int) -> tuple[Int[np.ndarray, "n"], list[np.ndarray], list[BadImage]]:
    """All batches together, in arrays that are made once."""
    indices = np.empty(total, dtype=np.int64)
    arrays: list[np.ndarray] = []
    bad: list[BadImage] = []
    stop = 0
    for batch in batches:
        start, stop = stop, stop + len(batch.indices)
        indices[start:stop] = batch.indices
        bad += batch.bad
        if not arrays:
            arrays = [np.empty((total, *values.shape[1:]), dtype=np.float32) for values in batch.values]
        for array, values in zip(arrays, batch.values, strict=False):  # a batch without readable images has none
            array[start:stop] = values
    if not stop:
        raise UserError(f"None of {total} images can be read. The first is\n{bad[0].location}: {bad[0].reason}")
    return indices[:stop], [array[:stop] for array in arrays], bad


def _check_finite(values: list[np.ndarray], indices: np.ndarray, source: ImageSource, backbone: Backbone) -> None:
    for layer in values:
        finite = np.isfinite(layer.reshape(len(layer), -1)).all(axis=1)
        if not finite.all():
            first = source.location(int(indices[np.argmin(finite)]))
            raise UserError(
                f"{backbone.name} gives features that are not finite numbers, first for {first}.\n"
                "Its weights hold NaN or overflow: take an earlier checkpoint of the run."
            )


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C, which reaches every process, to the one that ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _workers(wanted: int | None, images: int) -> int:
    if wanted is not None:
        return wanted
    return 0 if images < _FEW_IMAGES else default_workers()
