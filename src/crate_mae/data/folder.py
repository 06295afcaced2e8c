"""A folder of images, at any depth. Its listing is cached until one of its folders changes."""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from crate_mae.data.base import EncodedSource, files_fingerprint, number_labels, printable, read_file
from crate_mae.data.files import cache_folder, write_whole
from crate_mae.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})

_LISTING_VERSION = 1
# A folder that changed within this time before it was listed may change again without a new modification time.
_SETTLED_NS = 2_000_000_000


@dataclass
class Listing:
    """The files below a folder, by relative POSIX paths.

    Attributes:
        images: sorted paths of the image files.
        containers: sorted paths of the `.parquet` and `.tar` files.
        others: number of other files by suffix.
        folders: modification time in ns of every folder below, and of the folder itself (".").
    """

    images: list[str]
    containers: list[str]
    others: dict[str, int]
    folders: dict[str, int]


class FolderSource(EncodedSource):
    """Image files of one folder, in the order of their POSIX paths.

    Labels are the names of the top-level sub-folders, if every image is in one and there are at least two. Folders
    named like splits ("train", "val") are not classes.
    """

    def __init__(self, root: Path, images: list[str], name: str) -> None:
        labels, classes = _folder_labels(images)
        super().__init__(name, labels, classes)
        self._root = root
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def content(self, i: int) -> bytes:
        """The bytes of file i."""
        return read_file(self._root / self._images[i], self.location(i))

    def location(self, i: int) -> str:
        """The path of file i."""
        return printable(self._root / self._images[i])

    def fingerprint(self) -> str | None:
        """Of all image files."""
        return files_fingerprint(self._root / image for image in self._images)


def list_folder(root: Path) -> Listing:
    """List a folder, from the cache if no folder in it has changed.

    If the cache cannot be read or written, the folder is listed again each time.

    Raises:
        UserError: if a folder may not be read.
    """
    root = root.absolute()
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
    cache = cache_folder() / "folders" / f"{digest}.json"
    cached = _cached_listing(cache, root)
    if cached is not None:
        return cached
    listing = _scan(root)
    if time.time_ns() - max(listing.folders.values()) > _SETTLED_NS:
        content = json.dumps({"version": _LISTING_VERSION, "root": str(root), **asdict(listing)})
        with contextlib.suppress(UserError):
            write_whole(cache, content.encode("ascii"))
    return listing


def _cached_listing(cache: Path, root: Path) -> Listing | None:
    try:
        content = json.loads(cache.read_bytes())
        if (content.pop("version"), content.pop("root")) != (_LISTING_VERSION, str(root)):
            return None
        listing = Listing(**content)
        unchanged = all((root / name).stat().st_mtime_ns == mtime for name, mtime in listing.folders.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return listing if unchanged else None


def _scan(root: Path) -> Listing:
    listing = Listing([], [], {}, {})
    others: Counter[str] = Counter()
    for name in _walk(root, PurePosixPath(), frozenset(), listing.folders):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            listing.images.append(name)
        else:
            others[suffix] += 1
            if suffix in (".parquet", ".tar"):
                listing.containers.append(name)
    listing.images.sort()
    listing.containers.sort()
    listing.others = dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))
    return listing


def _walk(
    root: Path, folder: PurePosixPath, above: frozenset[tuple[int, int]], folders: dict[str, int]
) -> Iterator[str]:
    """Yield files below a folder, following links except into a folder that contains it. Fills `folders`."""
    try:
        status = (root / folder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        folders[str(folder)] = status.st_mtime_ns
        with os.scandir(root / folder) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {printable(root / folder)}: {(error.strerror or str(error)).lower()}.\n"
            "Allow it (chmod u+rx), or move it out of the data."
        ) from error
    for name, is_folder in found:
        if is_folder:
            yield from _walk(root, folder / name, above | {identity}, folders)
        else:
            yield str(folder / name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _folder_labels(images: list[str]) -> tuple[Int[np.ndarray, "n"] | None, list[str] | None]:
    if not all("/" in name for name in images):
        return None, None
    tops = [name.split("/", 1)[0] for name in images]
    distinct = set(tops)
    if len(distinct) < 2 or all(name.lower() in SPLIT_NAMES for name in distinct):
        return None, None
    return number_labels(tops)
