"""From whatever a Python program holds (paths, pictures, arrays, tensors) to features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from crate_mae.data.base import read_file
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.transforms import Preparation
from crate_mae.data.wrapped import DatasetSource
from crate_mae.errors import UserError
from crate_mae.models.features import DEFAULT_LAYER, Pooling, encode, evaluating

OneImage = str | Path | Image.Image | np.ndarray | Tensor


def embed_images(
    encoder: nn.Module,
    transform: Preparation,
    images: OneImage | Sequence[OneImage],
    *,
    layer: int = DEFAULT_LAYER,
    pooling: Pooling | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "b f"] | Float[Tensor, "b n d"]:
    """Features of images in memory or in files, in float32 on the CPU.

    Args:
        encoder: a timm backbone.
        transform: prepares one image for it.
        images: see `MaskedAutoencoder.embed`.
        layer: see `features.encode_layers`.
        pooling: see `features.pool`.
        batch_size: images that are encoded at once.

    Raises:
        UserError: for no images, one that cannot be read (named), or one that is none.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    items = _items(images)
    source = DatasetSource(_Opened(items), "images")
    parameter = next(encoder.parameters())
    features: list[Tensor] = []
    with evaluating(encoder):
        for start in range(0, len(items), batch_size):
            numbers = range(start, min(start + batch_size, len(items)))
            batch = torch.stack([_prepared(source, transform, items, i) for i in numbers])
            features.append(encode(encoder, batch.to(parameter.device, parameter.dtype), layer, pooling).float().cpu())
    # Joined outside of inference mode, so that the result may be trained on.
    return torch.cat(features)


class _Opened:
    """Items of which paths are replaced by the contents of their files."""

    def __init__(self, items: list[OneImage]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int, /) -> Any:
        item = self._items[index]
        return read_file(Path(item), str(item)) if isinstance(item, (str, Path)) else item


def _items(images: OneImage | Sequence[OneImage]) -> list[OneImage]:
    """A list, also of one image, or of a tensor or array that holds several."""
    items: list[OneImage]
    if isinstance(images, (Tensor, np.ndarray)):
        items = [*images] if images.ndim == 4 else [images]
    elif isinstance(images, (str, Path, Image.Image)):
        items = [images]
    else:
        items = list(images)
    if not items:
        raise UserError("There are no images to embed: the list is empty.")
    for item in items:
        if isinstance(item, (str, Path)) and Path(item).is_dir():
            raise UserError(f'{item} is a folder. For all its images: crate_mae.embed(model, "{item}", out=...).')
    return items


def _prepared(source: DatasetSource, transform: Preparation, items: list[OneImage], i: int) -> Tensor:
    try:
        return transform(source.read(i))
    except UnreadableImage as error:
        where = items[i] if isinstance(items[i], (str, Path)) else error.location
        raise UserError(f"{where} cannot be embedded: {error.reason}.") from error
