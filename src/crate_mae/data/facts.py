"""Facts about the images of a source: sizes, channels, mean and std from a fixed sample; and a check of all images."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from crate_mae.data.base import EncodedSource, ImageSource, fixed_sample
from crate_mae.data.decode import (
    DEEP_MODES,
    UNBOUNDED_MODES,
    UnreadableImage,
    channels_of,
    decode,
    size_of,
    to_channels,
)
from crate_mae.data.results import BadImage, DataReport, ImageFacts
from crate_mae.errors import UserError

# Limits `channel_statistics` to about 80 photographs of 12 megapixels, a few seconds.
_MOST_PIXELS = 10**9
_PROBE = 16
_SMALLEST_STD = 1 / 255
_GREY_STEP = 16  # pixels between those that are looked at first


def describe_images(source: ImageSource, sample: int = 64) -> ImageFacts:
    """Find channels and median size of a fixed pseudo-random sample.

    Raises:
        UserError: if no image of the sample can be read.
    """
    indices = fixed_sample(len(source), sample)
    first_error: UnreadableImage | None = None
    sizes: list[tuple[int, int]] = []
    channels: Counter[int] = Counter()
    for i in indices:
        try:
            image = source.read(i)
        except UnreadableImage as error:
            first_error = first_error or error
            continue
        sizes.append(size_of(image))
        channels[channels_of(image)] += 1
    if not sizes:
        raise UserError(f"None of {len(indices)} images of {source.name} can be read. The first is\n{first_error}")
    return _facts(sizes, channels, len(indices))


def _facts(sizes: list[tuple[int, int]], channels: Counter[int], sampled: int) -> ImageFacts:
    height, width = np.median(np.array(sizes), axis=0)
    # Grey becomes colour without loss.
    others = {number: count for number, count in channels.items() if number != 1}
    prevalent = max(others, key=others.__getitem__) if others else 1
    return ImageFacts(prevalent, int(height), int(width), len(sizes), sampled)


def channel_statistics(
    source: ImageSource, channels: int, sample: int = 2000, seed: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Measure mean and standard deviation of each channel, in [0, 1], of a fixed pseudo-random sample.

    Each image has the same weight, whatever its size: with $m_i$ and $q_i$ the mean and mean square of image i,
    $\mu = \frac1N \sum_i m_i$ and $\sigma^2 = \frac1N \sum_i q_i - \mu^2$, in float64. For images of one size that is
    the usual mean and deviation over all pixels. Unreadable images are left out. If images are large, the sample is
    made smaller, down to about 10^9 pixels in all.

    Returns:
        means and standard deviations, the latter at least 1/255 so that constant channels can be divided by them.

    Raises:
        UserError: if no image of the sample can be read, or its channels do not fit.
    """
    first, second = np.zeros(channels), np.zeros(channels)
    count = 0
    for i in fixed_sample(len(source), _affordable(source, sample), seed):
        try:
            moments = _moments(to_channels(source.read(i), channels))
        except UnreadableImage:
            continue
        first += moments[0]
        second += moments[1]
        count += 1
    if not count:
        command = source.check_command
        see = f" See: {command}" if command else ""
        raise UserError(f"No image of {source.name} can be read, so it has no mean.{see}")
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, _SMALLEST_STD**2))
    return tuple(mean.tolist()), tuple(std.tolist())


def check(source: ImageSource, sample: int | None = None, *, on_image: Callable[[], None] | None = None) -> DataReport:
    """Read every image of a source, or a fixed sample of them, and report.

    Args:
        source: the images.
        sample: number of images to read; None for all.
        on_image: called after each image, for a progress bar.
    """
    indices = fixed_sample(len(source), sample)
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    channels: Counter[int] = Counter()
    values: dict[str, tuple[float, float]] = {}
    grey_colour = 0
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    bad: list[BadImage] = []
    for i in indices:
        try:
            image, digest = read_with_digest(source, i)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
        else:
            sizes.append(size_of(image))
            modes[_mode(image)] += 1
            formats[getattr(image, "format", None) or "no file"] += 1
            channels[channels_of(image)] += 1
            low, high = _extrema(image)
            before = values.get(_mode(image), (low, high))
            values[_mode(image)] = min(low, before[0]), max(high, before[1])
            grey_colour += _is_grey_colour(image)
            same[digest].append(i)
        if on_image is not None:
            on_image()
    return DataReport(
        name=source.name,
        images=len(source),
        checked=len(indices),
        classes=_class_counts(source),
        heights=_spread([height for height, _ in sizes]),
        widths=_spread([width for _, width in sizes]),
        modes=dict(modes.most_common()),
        formats=dict(formats.most_common()),
        bad=tuple(bad),
        left_out=dict(source.left_out),
        values=values,
        grey_colour=grey_colour,
        ranges={mode: source.value_range(mode) for mode in sorted(UNBOUNDED_MODES & set(modes))},
        duplicates=tuple(tuple(map(source.location, group)) for group in same.values() if len(group) > 1),
        **_suggestions(source, sizes, channels, len(indices)),
    )


# (shorter side up to which, the preset, its image size)
_SUGGESTIONS = (
    (12, "crate_mae_nano_patch2_8", 8),
    (48, "crate_mae_micro_wide_patch4_32", 32),
    (80, "crate_mae_micro_wide_patch8_64", 64),
    (112, "crate_mae_micro_wide_patch12_96", 96),
    (176, "crate_mae_micro_wide_patch16_128", 128),
)
_LARGEST_SUGGESTION = ("crate_mae_tiny_patch16_224", 224)


def suggest_model(facts: ImageFacts) -> tuple[str, int]:
    """Return the preset for images of this size, and its image size: the one nearest to the median shorter side."""
    side = min(facts.height, facts.width)
    return next(((name, size) for most, name, size in _SUGGESTIONS if side <= most), _LARGEST_SUGGESTION)


def _affordable(source: ImageSource, sample: int) -> int:
    """Reduce the sample if the images are so large that decoding it would take minutes."""
    try:
        facts = describe_images(source, _PROBE)
    except UserError:  # these few images may be bad while others are not
        return sample
    return min(sample, max(_PROBE, _MOST_PIXELS // (facts.height * facts.width)))


def _moments(image: Image.Image | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and mean square of each channel in [0, 1]; for 8-bit images exactly, from their histograms."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().double().flatten(1)
        pixels = pixels / 255 if not image.is_floating_point() else pixels
        return pixels.mean(1).numpy(), pixels.square().mean(1).numpy()
    levels = np.arange(256) / 255
    share = np.array(image.histogram(), dtype=np.float64).reshape(-1, 256) / (image.height * image.width)
    return share @ levels, share @ levels**2


def _suggestions(
    source: ImageSource, sizes: list[tuple[int, int]], channels: Counter[int], sampled: int
) -> dict[str, Any]:
    """Return the fields of a `DataReport` that help to choose a model and to normalise images."""
    if not sizes:
        return {"channels": None, "mean": (), "std": (), "suggested_model": None, "suggested_image_size": None}
    facts = _facts(sizes, channels, sampled)
    model, image_size = suggest_model(facts)
    # Images of several counts other than 1 have no common mean, and cannot be trained on.
    is_one_kind = set(channels) <= {1, facts.channels}
    mean, std = channel_statistics(source, facts.channels) if is_one_kind else ((), ())
    return {
        "channels": facts.channels,
        "mean": mean,
        "std": std,
        "suggested_model": model,
        "suggested_image_size": image_size,
    }


def read_with_digest(source: ImageSource, i: int) -> tuple[Image.Image | Tensor, bytes]:
    """Read image i and a digest: two are equal only if the bytes (of files) or pixels (of others) are the same."""
    if isinstance(source, EncodedSource):
        content = source.content(i)
        return decode(content, source.location(i)), hashlib.sha256(content).digest()
    image = source.picture(i)
    return image, hashlib.sha256(pixel_bytes(image)).digest()


def pixel_bytes(image: Image.Image | Tensor) -> bytes:
    """The pixels of an image, with their type and shape: equal only if the images are."""
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.detach().cpu().numpy()
    return f"{_mode(image)} {pixels.shape}".encode() + pixels.tobytes()


def _extrema(image: Image.Image | Tensor) -> tuple[float, float]:
    """The smallest and the largest value of an image as it is stored, over all channels."""
    if isinstance(image, Tensor):
        return float(image.min()), float(image.max())
    if image.mode not in DEEP_MODES:
        extrema = image.getextrema()
        return float(np.min(extrema)), float(np.max(extrema))
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _is_grey_colour(image: Image.Image | Tensor) -> bool:
    """Whether red, green and blue are the same in every pixel of a colour image."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().numpy() if image.shape[0] == 3 else None
    else:
        pixels = np.moveaxis(np.asarray(image), 2, 0)[:3] if image.mode in ("RGB", "RGBA", "RGBX") else None
    if pixels is None:
        return False
    some = pixels[:, ::_GREY_STEP, ::_GREY_STEP]  # mostly enough to see colour, in a hundredth of the time
    return all(bool((part[0] == part[1]).all() and (part[0] == part[2]).all()) for part in (some, pixels))


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
        names[number] if names else str(number): count
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        if number >= 0
    }


def _spread(values: list[int]) -> tuple[int, ...]:
    return (min(values), int(np.median(values)), max(values)) if values else ()
