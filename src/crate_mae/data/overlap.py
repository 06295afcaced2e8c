"""Images that two sources share although they should not: the same ones, or copies under other names."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator

from crate_mae.data.base import EncodedSource, ImageSource, fixed_sample
from crate_mae.data.dataset import default_generator_seeded, global_generators_seeded
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.facts import pixel_bytes, read_with_digest
from crate_mae.errors import UserError

logger = logging.getLogger(__name__)

_SAMPLED = 16  # images of a source whose contents or sizes stand for those of all
# Bytes that `find_copies` reads, in some seconds. Opening a small file takes as long as so many: 131,072 small images.
_MOST_COMPARED = 2 * 2**30
_LEAST_COMPARED = 16 * 2**10


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
    _warn_of_copies(train, val, option)


def _warn_of_copies(train: ImageSource, val: ImageSource, option: str) -> None:
    """Name the images of --val that are also in `train` under another name."""
    pairs, compared = find_copies(train, val)
    found = ""
    if pairs:
        first, second = pairs[0]
        found = (
            f"{len(pairs):,} of {compared[1]:,} images of --val ({val.name}) are also in {option} ({train.name}), e.g. "
            f"{val.location(second)} = {train.location(first)}."
        )
    if 0 < sum(compared) < len(train) + len(val):
        found += (
            f" Copies were looked for among {compared[0]:,} of the {len(train):,} images of {option} and "
            f"{compared[1]:,} of the {len(val):,} of --val, since reading all would take long."
        )
    if found:
        logger.warning("%s", found.strip())


UNREADABLE = "unreadable"  # in place of the digest of an image


def content_digests(source: ImageSource) -> list[str]:
    """Digests of the contents of a fixed pseudo-random sample: of the bytes of files, of the pixels of others."""
    found = []
    for i in fixed_sample(len(source), _SAMPLED):
        try:
            with _same_each_time():
                found.append(read_with_digest(source, i)[1].hex())
        except UnreadableImage:
            found.append(UNREADABLE)
    return found


def find_copies(first: ImageSource, second: ImageSource) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Find the images of one source that are also in another: equal bytes of files, or equal pixels of others.

    Nothing is decoded, so a copy that was saved again is not found, nor one among Python objects of a file. If both
    together have more than 2 GiB, or 131,072 images, a fixed pseudo-random sample of each is compared. The images of
    CIFAR-10 take a second.

    Returns:
        pairs (number in `first`, number in `second`), one for each image of `second` that is found; and how many images
        of each were compared.
    """
    if isinstance(first, EncodedSource) != isinstance(second, EncodedSource):
        return [], (0, 0)
    sizes = [_mean_bytes(source) for source in (first, second)]
    needed = [size * len(source) for size, source in zip(sizes, (first, second), strict=True)]
    of_second = min(needed[1], max(_MOST_COMPARED / 2, _MOST_COMPARED - needed[0]))  # finds most copies
    limits = (_MOST_COMPARED - of_second, of_second)
    samples = [
        fixed_sample(len(source), max(1, int(limit / size)))
        for source, limit, size in zip((first, second), limits, sizes, strict=True)
    ]
    known = {digest: i for i in reversed(samples[0]) if (digest := _digest(first, i))}
    pairs = [(known[digest], i) for i in samples[1] if (digest := _digest(second, i)) in known]
    return pairs, (len(samples[0]), len(samples[1]))


def _mean_bytes(source: ImageSource) -> float:
    """Bytes to read for one image, of the file or of its pixels: the mean of a few, and at least `_LEAST_COMPARED`."""
    few = fixed_sample(len(source), _SAMPLED)
    sizes = [len(content) for i in few if (content := _content(source, i)) is not None]
    return max(_LEAST_COMPARED, sum(sizes) / max(1, len(sizes)))


def _digest(source: ImageSource, i: int) -> bytes | None:
    content = _content(source, i)
    return None if content is None else hashlib.sha256(content).digest()


def _content(source: ImageSource, i: int) -> bytes | None:
    """The bytes of file i, or the pixels of another image; None if they cannot be read."""
    try:
        if isinstance(source, EncodedSource):
            return source.content(i)
        with _same_each_time():
            return pixel_bytes(source.picture(i))
    except UnreadableImage:
        return None


@contextlib.contextmanager
def _same_each_time() -> Iterator[None]:
    """Seed all generators: a data set of Python may change its images at random."""
    with default_generator_seeded(0), global_generators_seeded(0):
        yield
