"""A full look at a source before training on it: what is there, what is broken, what is there twice."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from crate_mae.data.base import EncodedSource, ImageSource
from crate_mae.data.decode import UnreadableImage, channels_of, decode, size_of
from crate_mae.data.facts import channel_statistics, fixed_sample, prevalent_channels, suggest_model
from crate_mae.data.results import BadImage, DataReport, ImageFacts


def check(source: ImageSource, sample: int | None = None, *, on_image: Callable[[], None] | None = None) -> DataReport:
    """Read every image of a source, or a fixed sample of them, and report.

    Args:
        source: the images.
        sample: how many to read; None for all.
        on_image: called after each, for a progress bar.
    """
    indices = fixed_sample(len(source), sample)
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    channels: Counter[int] = Counter()
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    bad: list[BadImage] = []
    for i in indices:
        try:
            image, digest = _read_with_digest(source, i)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
        else:
            sizes.append(size_of(image))
            modes[_mode(image)] += 1
            formats[getattr(image, "format", None) or "no file"] += 1
            channels[channels_of(image)] += 1
            same[digest].append(i)
        if on_image is not None:
            on_image()
    model = image_size = count = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if sizes:
        count = prevalent_channels(channels)
        height, width = np.median(np.array(sizes), axis=0)
        model, image_size = suggest_model(ImageFacts(count, int(height), int(width), len(sizes), len(indices)))
        if set(channels) <= {1, count}:  # several other counts have no mean in common, and cannot be trained on
            mean, std = channel_statistics(source, count)
    return DataReport(
        name=source.name,
        images=len(source),
        checked=len(indices),
        classes=_class_counts(source),
        heights=_spread([height for height, _ in sizes]),
        widths=_spread([width for _, width in sizes]),
        channels=count,
        modes=dict(modes.most_common()),
        formats=dict(formats.most_common()),
        bad=tuple(bad),
        duplicates=tuple(tuple(map(source.location, group)) for group in same.values() if len(group) > 1),
        mean=mean,
        std=std,
        suggested_model=model,
        suggested_image_size=image_size,
    )


def _read_with_digest(source: ImageSource, i: int) -> tuple[Image.Image | Tensor, bytes]:
    """Image i, and what two images share only if their bytes (of files) or pixels (of others) are the same."""
    if isinstance(source, EncodedSource):
        content = source.content(i)
        return decode(content, source.location(i)), hashlib.sha256(content).digest()
    image = source.read(i)
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.detach().cpu().numpy()
    return image, hashlib.sha256(f"{_mode(image)} {pixels.shape}".encode() + pixels.tobytes()).digest()


def _mode(image: Image.Image | Tensor) -> str:
    if isinstance(image, Tensor):
        return f"{image.shape[0]} x {str(image.dtype).removeprefix('torch.')}"
    return image.mode


def _class_counts(source: ImageSource) -> dict[str, int] | None:
    if source.labels is None:
        return None
    numbers, counts = np.unique(source.labels, return_counts=True)
    names = source.classes or []
    return {
        names[number] if number < len(names) else str(number): count
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
    }


def _spread(values: list[int]) -> tuple[int, ...]:
    return (min(values), int(np.median(values)), max(values)) if values else ()
