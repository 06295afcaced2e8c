"""What the images of a source are: their sizes, channels, mean and deviation; and which of them are copies of others.

They are read in fixed samples, or all of them in a check.
"""

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from crate_mae.data.base import (
    EncodedSource,
    ImageSource,
    fixed_sample,
    label_names,
    none_readable,
    occurring_classes,
    read_all,
)
from crate_mae.data.decode import (
    DEEP_MODES,
    UNBOUNDED_MODES,
    UnreadableImage,
    channels_of,
    decode,
    size_of,
    to_channels,
    to_tensor,
)
from crate_mae.data.results import BadImage, DataReport, ImageFacts
from crate_mae.errors import UserError

logger = logging.getLogger(__name__)

_MEASURED = 2000  # images for `channel_statistics`
_MOST_PIXELS = 10**9  # of these: about 80 photographs of 12 megapixels, a few seconds
_PROBE = 16
_SMALLEST_STD = 1 / 255
_GREY_STEP = 16  # pixels between those that are looked at first
_SAMPLED = 16  # images of a source whose contents or sizes stand for those of all
# Bytes that `find_copies` reads, in some seconds. Opening a small file takes as long as so many: 131,072 small images.
_MOST_COMPARED = 2 * 2**30
_LEAST_COMPARED = 16 * 2**10
UNREADABLE = "unreadable"  # in place of the digest of an image


def describe_images(source: ImageSource, sample: int = 64) -> ImageFacts:
    """Find channels and median size of a fixed pseudo-random sample.

    Raises:
        UserError: if no image of the sample can be read.
    """
    indices = fixed_sample(len(source), sample)
    read, bad = read_all(source, indices, lambda image: (size_of(image), channels_of(image)))
    if not read:
        raise none_readable(f"None of {len(indices)} images of {source.name}", bad[0])
    return _facts([size for size, _ in read.values()], Counter(channels for _, channels in read.values()))


def _facts(sizes: list[tuple[int, int]], channels: Counter[int]) -> ImageFacts:
    height, width = np.median(np.array(sizes), axis=0)
    # Grey becomes colour without loss.
    others = {number: count for number, count in channels.items() if number != 1}
    prevalent = max(others, key=others.__getitem__) if others else 1
    return ImageFacts(prevalent, int(height), int(width))


def channel_statistics(source: ImageSource, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Measure mean and standard deviation of each channel, in [0, 1], of a fixed pseudo-random sample of 2,000 images.

    Each image has the same weight, whatever its size: with $m_i$ and $q_i$ the mean and mean square of image i,
    $\mu = \frac1N \sum_i m_i$ and $\sigma^2 = \frac1N \sum_i q_i - \mu^2$, in float64. For images of one size that is
    the usual mean and deviation over all pixels. Unreadable images are left out. If images are large, the sample is
    made smaller, down to about 10^9 pixels in all.

    Returns:
        means and standard deviations, the latter at least 1/255 so that constant channels can be divided by them.

    Raises:
        UserError: if no image of the sample can be read, or its channels do not fit.
    """
    indices = fixed_sample(len(source), _affordable(source))
    read, bad = read_all(source, indices, lambda image: _moments(to_channels(image, channels)))
    if not read:
        raise none_readable(f"No image of {source.name}", bad[0])
    mean, square = (np.asarray(sum(moments)) / len(read) for moments in zip(*read.values(), strict=True))
    std = np.sqrt(np.maximum(square - mean**2, _SMALLEST_STD**2))
    return tuple(mean.tolist()), tuple(std.tolist())


def check(source: ImageSource, sample: int | None = None, *, on_image: Callable[[], None] | None = None) -> DataReport:
    """Read every image of a source, or a fixed sample of so many, and report.

    `on_image` is called after each image, for a progress bar.
    """
    indices = fixed_sample(len(source), sample)
    tally = _Tally()
    bad: list[BadImage] = []
    for i in indices:
        try:
            image, content = _read_with_content(source, i)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
        else:
            tally.add(i, image, content)
        if on_image is not None:
            on_image()
    facts = _facts(tally.sizes, tally.channels) if tally.sizes else None
    model, image_size = suggest_model(facts) if facts else (None, None)
    # Images of several counts other than 1 have no common mean, and cannot be trained on.
    is_one_kind = facts is not None and set(tally.channels) <= {1, facts.channels}
    mean, std = channel_statistics(source, facts.channels) if facts and is_one_kind else ((), ())
    names = label_names(source)
    per_class = Counter(names or ())
    return DataReport(
        name=source.name,
        images=len(source),
        checked=len(indices),
        classes=None if names is None else {name: per_class[name] for name in occurring_classes(source)},
        heights=_min_median_max([height for height, _ in tally.sizes]),
        widths=_min_median_max([width for _, width in tally.sizes]),
        modes=dict(tally.modes.most_common()),
        formats=dict(tally.formats.most_common()),
        bad=tuple(bad),
        left_out=dict(source.left_out),
        values=tally.values,
        grey_colour=tally.grey_colour,
        ranges={mode: source.value_range(mode) for mode in sorted(UNBOUNDED_MODES & set(tally.modes))},
        duplicates=tuple(tuple(map(source.location, group)) for group in tally.same.values() if len(group) > 1),
        channels=facts.channels if facts else None,
        mean=mean,
        std=std,
        suggested_model=model,
        suggested_image_size=image_size,
    )


class _Tally:
    """What the images that were read are like, in all."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.channels: Counter[int] = Counter()
        self.values: dict[str, tuple[float, float]] = {}  # of each mode, the smallest and the largest
        self.grey_colour = 0
        self.same: defaultdict[bytes, list[int]] = defaultdict(list)  # images with the same content

    def add(self, i: int, image: Image.Image | Tensor, content: bytes) -> None:
        """Count an image, by its number, its pixels and the bytes that hold them."""
        mode, (low, high) = _mode(image), _extrema(image)
        least, largest = self.values.get(mode, (low, high))
        self.values[mode] = min(low, least), max(high, largest)
        self.sizes.append(size_of(image))
        self.modes[mode] += 1
        self.formats[getattr(image, "format", None) or "not from files"] += 1
        self.channels[channels_of(image)] += 1
        self.grey_colour += _is_grey_colour(image)
        self.same[hashlib.sha256(content).digest()].append(i)


def _read_with_content(source: ImageSource, i: int) -> tuple[Image.Image | Tensor, bytes]:
    """Image i, and the bytes of its file; of an image without a file the pixels, with their type and shape."""
    if isinstance(source, EncodedSource):
        content = source.content(i)
        return decode(content, source.location(i)), content
    image = source.repeatable_picture(i)
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.detach().cpu().numpy()
    return image, f"{_mode(image)} {pixels.shape}".encode() + pixels.tobytes()


_SUGGESTIONS = (  # shorter side up to which, the preset, its image size and patch size
    (12, "crate_mae_nano_isometric_patch2_8", 8, 2),
    (44, "crate_mae_micro_wide_monotone_patch4_32", 32, 4),
    (80, "crate_mae_micro_wide_monotone_patch8_64", 64, 8),
    (112, "crate_mae_micro_wide_monotone_patch12_96", 96, 12),
    (176, "crate_mae_micro_wide_monotone_patch16_128", 128, 16),
    (math.inf, "crate_mae_tiny_monotone_patch16_224", 224, 16),
)
_NUMBERS_OF_PATCHES = range(16, 257)  # of a suggestion at a size that is not its own


def suggest_model(facts: ImageFacts | None, image_size: int | tuple[int, int] | None = None) -> tuple[str, int]:
    """Return the preset for images of this size, and its image size: the one nearest to the median shorter side.

    Without facts, it is that for images of 32 pixels. If the images are to have another size, it is the nearest preset
    to that whose patches divide it into 16 to 256, or, if there is none, simply the nearest.
    """
    sides = (32, 32) if facts is None else (facts.height, facts.width)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    nearest = next(number for number, (most, *_) in enumerate(_SUGGESTIONS) if min(sides) <= most)
    if image_size is not None:
        by_distance = sorted(range(len(_SUGGESTIONS)), key=lambda number: (abs(number - nearest), -number))
        nearest = next((number for number in by_distance if _divides(_SUGGESTIONS[number][3], sides)), nearest)
    _, name, size, _ = _SUGGESTIONS[nearest]
    return name, size


def _divides(patch: int, sides: tuple[int, int]) -> bool:
    rows, columns = (side // patch for side in sides)
    return (rows * patch, columns * patch) == sides and rows * columns in _NUMBERS_OF_PATCHES


def cheaper_model(name: str) -> tuple[str, int] | None:
    """The preset, and its image size, that takes much less time than a suggested one; None if there is none."""
    return _SUGGESTIONS[-2][1:3] if name == _SUGGESTIONS[-1][1] else None


def _affordable(source: ImageSource) -> int:
    """The size of the sample, smaller if the images are so large that decoding it would take minutes."""
    try:
        facts = describe_images(source, _PROBE)
    except UserError:  # these few images may be bad while others are not
        return _MEASURED
    return min(_MEASURED, max(_PROBE, _MOST_PIXELS // (facts.height * facts.width)))


def _moments(image: Image.Image | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and mean square of each channel in [0, 1]; for 8-bit images exactly, from their histograms."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().double().flatten(1)
        pixels = pixels / 255 if not image.is_floating_point() else pixels
        return pixels.mean(1).numpy(), pixels.square().mean(1).numpy()
    levels = np.arange(256) / 255
    share = np.array(image.histogram(), dtype=np.float64).reshape(-1, 256) / (image.height * image.width)
    return share @ levels, share @ levels**2


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


def _min_median_max(values: list[int]) -> tuple[int, ...]:
    return (min(values), int(np.median(values)), max(values)) if values else ()


def same_images(first: ImageSource, second: ImageSource) -> bool:
    """Return whether two sources have the same images: the same files, or as many with the same contents in a sample.

    Copies in another order are not recognised.
    """
    fingerprint = first.fingerprint()
    if first is second or (fingerprint is not None and fingerprint == second.fingerprint()):
        return True
    return len(first) == len(second) and content_digests(first) == content_digests(second)


def refuse_shared_images(train: ImageSource, val: ImageSource, option: str, consequence: str) -> None:
    """Raise a `UserError` if images to measure on are among those that are learned from.

    They are recognised where both are the same files, rows, shard members or items, whichever way they were opened.
    Copies under other names are a warning: see `find_copies`.

    Args:
        train: learned from.
        val: measured on.
        option: how `train` is given.
        consequence: of measuring on them, which completes the sentence "... are the same images, so ...".
    """
    remedy = "Give other images with --val."
    if same_images(train, val):
        raise UserError(f"{option} and --val are the same images ({train.name}), so {consequence}.\n{remedy}")
    numbers = {origin: i for i, origin in enumerate(val.origins())}
    shared = [numbers[origin] for origin in train.origins() if origin in numbers]
    if shared:
        raise UserError(
            f"{len(shared):,} of {len(val):,} images of --val ({val.name}) are also in {option} ({train.name}), "
            f"such as {val.location(shared[0])}, so {consequence}.\n{remedy}"
        )
    warn_of_copies(train, val, option, "--val")


def warn_of_copies(train: ImageSource, val: ImageSource, option: str, val_option: str) -> None:
    """Name the images of `val` that are also in `train` under another name, both by the options that gave them."""
    pairs, compared = find_copies(train, val)
    found = ""
    if pairs:
        first, second = pairs[0]
        found = (
            f"{len(pairs):,} of {compared[1]:,} images of {val_option} ({val.name}) are also in {option} "
            f"({train.name}), e.g. "
            f"{val.location(second)} = {train.location(first)}."
        )
    if 0 < sum(compared) < len(train) + len(val):
        found += (
            f" Copies were looked for among {compared[0]:,} of the {len(train):,} images of {option} and "
            f"{compared[1]:,} of the {len(val):,} of {val_option}, since reading all would take long."
        )
    if found:
        logger.warning("%s", found.strip())


def content_digests(source: ImageSource) -> list[str]:
    """Digests of the contents of a fixed pseudo-random sample: of the bytes of files, of the pixels of others."""
    found = []
    for i in fixed_sample(len(source), _SAMPLED):
        try:
            found.append(hashlib.sha256(_read_with_content(source, i)[1]).hexdigest())
        except UnreadableImage:
            found.append(UNREADABLE)
    return found


def find_copies(first: ImageSource, second: ImageSource) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Find the images of one source that are also in another: equal bytes of files, or equal pixels.

    Files are compared with files without decoding them, so a copy that was saved again is not found; with Python
    objects they are compared by pixels. If both sources together have more than 2 GiB, or 131,072 images, a fixed
    pseudo-random sample of each is compared. The images of CIFAR-10 take a second.

    Returns:
        pairs (number in `first`, number in `second`), one for each image of `second` that is found; and how many images
        of each were compared.
    """
    decoded = isinstance(first, EncodedSource) != isinstance(second, EncodedSource)
    size, second_size = _mean_bytes(first, decoded), _mean_bytes(second, decoded)
    # Of `second` as much as finds most copies.
    of_second = min(second_size * len(second), max(_MOST_COMPARED / 2, _MOST_COMPARED - size * len(first)))
    sample = fixed_sample(len(first), max(1, round((_MOST_COMPARED - of_second) / size)))
    second_sample = fixed_sample(len(second), max(1, round(of_second / second_size)))
    known = {digest: i for i in reversed(sample) if (digest := image_digest(first, i, decoded=decoded))}
    pairs = [(known[digest], i) for i in second_sample if (digest := image_digest(second, i, decoded=decoded)) in known]
    return pairs, (len(sample), len(second_sample))


def _mean_bytes(source: ImageSource, decoded: bool) -> float:
    """Bytes to read for one image, of the file or of its pixels: the mean of a few, and at least `_LEAST_COMPARED`."""
    few = fixed_sample(len(source), _SAMPLED)
    sizes = [len(content) for i in few if (content := _content(source, i, decoded)) is not None]
    return max(_LEAST_COMPARED, sum(sizes) / max(1, len(sizes)))


def image_digest(source: ImageSource, i: int, *, decoded: bool = False) -> str:
    """A digest of the bytes of a file, or of the pixels of another or `decoded` image; "" if unreadable."""
    content = _content(source, i, decoded)
    return "" if content is None else hashlib.sha256(content).hexdigest()


def _content(source: ImageSource, i: int, decoded: bool) -> bytes | None:
    """The bytes of file i, or the pixels of another or `decoded` image; None if they cannot be read."""
    try:
        if not decoded:
            return source.content(i) if isinstance(source, EncodedSource) else _read_with_content(source, i)[1]
        image = source.repeatable_picture(i)
        pixels = np.asarray(to_tensor(image) if getattr(image, "mode", None) in ("L", "RGB") else image)
        return f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()
    except UnreadableImage:
        return None
