"""Facts about the images of a source: sizes, channels, mean and std from a fixed sample; and a check of all images."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from crate_mae.data.base import EncodedSource, ImageSource, fixed_sample
from crate_mae.data.dataset import default_generator_seeded, global_generators_seeded
from crate_mae.data.decode import UNBOUNDED_MODES, UnreadableImage, channels_of, decode, size_of, to_channels
from crate_mae.data.results import BadImage, DataReport, ImageFacts
from crate_mae.errors import UserError

# Limits `channel_statistics` to about 80 photographs of 12 megapixels, a few seconds.
_MOST_PIXELS = 10**9
_PROBE = 16
_SMALLEST_STD = 1 / 255


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
    height, width = np.median(np.array(sizes), axis=0)
    return ImageFacts(prevalent_channels(channels), int(height), int(width), len(sizes), len(indices))


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
        ranges={mode: source.value_range(mode) for mode in sorted(UNBOUNDED_MODES & set(modes))},
        duplicates=tuple(tuple(map(source.location, group)) for group in same.values() if len(group) > 1),
        **_suggestions(source, sizes, channels, len(indices)),
    )


def content_digests(source: ImageSource, sample: int = 16) -> list[str]:
    """Digests of the contents of a fixed pseudo-random sample: of the bytes of files, of the pixels of others."""
    return [_content_digest(source, i) for i in fixed_sample(len(source), sample)]


def _content_digest(source: ImageSource, i: int) -> str:
    try:
        # A data set of Python may change its images at random: with the same seeds, it does so in the same way.
        with default_generator_seeded(0), global_generators_seeded(0):
            return _read_with_digest(source, i)[1].hex()
    except UnreadableImage:
        return "unreadable"


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


def prevalent_channels(counts: Counter[int]) -> int:
    """Return 1 if all images are grey; else the most frequent other count, since grey becomes colour without loss."""
    others = {channels: count for channels, count in counts.items() if channels != 1}
    return max(others, key=others.__getitem__) if others else 1


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
    count = prevalent_channels(channels)
    height, width = np.median(np.array(sizes), axis=0)
    model, image_size = suggest_model(ImageFacts(count, int(height), int(width), len(sizes), sampled))
    # Images of several counts other than 1 have no common mean, and cannot be trained on.
    mean, std = channel_statistics(source, count) if set(channels) <= {1, count} else ((), ())
    return {
        "channels": count,
        "mean": mean,
        "std": std,
        "suggested_model": model,
        "suggested_image_size": image_size,
    }


def _read_with_digest(source: ImageSource, i: int) -> tuple[Image.Image | Tensor, bytes]:
    """Read image i and a digest: two are equal only if the bytes (of files) or pixels (of others) are the same."""
    if isinstance(source, EncodedSource):
        content = source.content(i)
        return decode(content, source.location(i)), hashlib.sha256(content).digest()
    image = source.picture(i)
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
        names[number] if names else str(number): count
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        if number >= 0
    }


def _spread(values: list[int]) -> tuple[int, ...]:
    return (min(values), int(np.median(values)), max(values)) if values else ()
