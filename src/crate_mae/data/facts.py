"""What the images are like: sizes, channels, and the statistics to normalise by, from a fixed sample of them."""

from collections import Counter

import numpy as np
from PIL import Image
from torch import Tensor

from crate_mae.data.base import ImageSource
from crate_mae.data.decode import UnreadableImage, channels_of, size_of, to_channels
from crate_mae.data.results import ImageFacts
from crate_mae.errors import UserError

# `channel_statistics` stays at some 80 photographs of 12 megapixels, a few seconds.
_MOST_PIXELS = 10**9
_PROBE = 16
_SMALLEST_STD = 1 / 255


def describe_images(source: ImageSource, sample: int = 64) -> ImageFacts:
    """Channels and median size of a fixed pseudo-random sample.

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
    r"""Mean and standard deviation of each channel, in [0, 1], over a fixed pseudo-random sample.

    Each image has the same weight, whatever its size: with $m_i$ and $q_i$ the mean and mean square of image i,
    $\mu = \frac1N \sum_i m_i$ and $\sigma^2 = \frac1N \sum_i q_i - \mu^2$, in float64. For images of one size that is
    the usual mean and deviation over all pixels. Unreadable images are left out. Of large
    images the sample is made smaller, down to about 10^9 pixels in all.

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
        raise UserError(f"No image of {source.name} can be read, so it has no mean. See: crate-mae data check")
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, _SMALLEST_STD**2))
    return tuple(mean.tolist()), tuple(std.tolist())


def suggest_model(facts: ImageFacts) -> tuple[str, int]:
    """The preset made for images of this size, and its image size: 8, 32 or 224 by the shorter side."""
    side = min(facts.height, facts.width)
    if side <= 12:
        return "crate_mae_nano_patch2_8", 8
    if side <= 48:
        return "crate_mae_micro_patch4_32", 32
    return "crate_mae_tiny_patch16_224", 224


def fixed_sample(length: int, sample: int | None, seed: int = 0) -> list[int]:
    """`sample` distinct pseudo-random numbers below `length`, sorted for quick reading; all numbers for None."""
    if sample is None or sample >= length:
        return list(range(length))
    if sample < 1:
        raise UserError(f"A sample holds at least one image, got {sample}.")
    return sorted(np.random.default_rng(seed).choice(length, sample, replace=False).tolist())


def prevalent_channels(counts: Counter[int]) -> int:
    """1 if all images are grey; if not, the most frequent other count, since grey becomes colour without loss."""
    others = {channels: count for channels, count in counts.items() if channels != 1}
    return max(others, key=others.__getitem__) if others else 1


def _affordable(source: ImageSource, sample: int) -> int:
    """A smaller sample where the images are so large that decoding all of it would take minutes."""
    try:
        facts = describe_images(source, _PROBE)
    except UserError:  # these few may be bad where others are not
        return sample
    return min(sample, max(_PROBE, _MOST_PIXELS // (facts.height * facts.width)))


def _moments(image: Image.Image | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of each channel in [0, 1]; of 8-bit images exactly, through their histograms."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().double().flatten(1)
        pixels = pixels / 255 if not image.is_floating_point() else pixels
        return pixels.mean(1).numpy(), pixels.square().mean(1).numpy()
    levels = np.arange(256) / 255
    share = np.array(image.histogram(), dtype=np.float64).reshape(-1, 256) / (image.height * image.width)
    return share @ levels, share @ levels**2
