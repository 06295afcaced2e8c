"""A folder of images, at any depth."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from crate_mae.data.base import EncodedSource, number_labels, printable, read_file, text_of
from crate_mae.data.decode import image_suffixes
from crate_mae.data.files import files_fingerprint, reason_of
from crate_mae.errors import UserError

SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
# Made by file managers, operating systems and network drives; some hold small copies of the images.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
)
_MOST_FOLDERS = 1_000_000  # links among folders can make far more of a few


class FolderSource(EncodedSource):
    """Image files of one folder, in the order of their POSIX paths.

    Labels are the names of the top-level sub-folders, if every image is in one and there are at least two. Folders
    named like splits ("train", "val") are not classes.

    Attributes:
        root: the folder.
        images: paths of the files in it.
    """

    def __init__(self, root: Path, images: list[str], name: str) -> None:
        labels, classes = _folder_labels(images)
        super().__init__(name, labels, classes)
        self.root = root
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def content(self, i: int) -> bytes:
        """The bytes of file i."""
        return read_file(self.root / self.images[i], self.location(i))

    def location(self, i: int) -> str:
        """The path of file i."""
        return printable(self.root / self.images[i])

    def origins(self) -> Iterator[str]:
        """The files, without links to their folder."""
        root = os.path.realpath(self.root)
        return (f"{root}/{image}" for image in self.images)

    def fingerprint(self) -> str | None:
        """Of all image files."""
        return files_fingerprint((image, self.root / image) for image in self.images)


def list_folder(root: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """List the files below a folder, by relative POSIX paths.

    Returns:
        the sorted paths of image files, and of `.parquet` and `.tar` files; and the number of files that are no images
        by suffix, and of folders of the system by name with "/".

    Raises:
        UserError: if a folder may not be read.
    """
    images: list[str] = []
    containers: list[str] = []
    others: Counter[str] = Counter()
    read = image_suffixes()
    for name in _walk(root.absolute()):
        suffix = PurePosixPath(name).suffix.lower()
        if name.endswith("/"):
            others[f"{PurePosixPath(name).name}/"] += 1
        elif suffix in read:
            images.append(name)
        else:
            others[suffix] += 1
            if suffix in (".parquet", ".tar"):
                containers.append(name)
    counts = dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))
    return sorted(images), sorted(containers), counts


def _walk(root: Path) -> Iterator[str]:
    """Yield files below a folder, and folders of the system with "/" at the end.

    Links are followed except into a folder that contains them. Without recursion, which ends at a thousand levels.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    visited = 0
    while waiting:
        below, above = waiting.pop()
        folder = f"{root}/{below}"
        visited += 1
        if visited > _MOST_FOLDERS:
            raise UserError(
                f"{printable(root)} has more than {_MOST_FOLDERS:,} folders, such as {_shortened(folder)}.\n"
                "Remove links to large folders from the data."
            )
        try:
            status = os.stat(folder)  # noqa: PTH116  # paths as text are ten times as fast
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                found = [(below + entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(
                f"Cannot read the folder {_shortened(folder)}: {reason_of(error)}.\n"
                "Allow it (chmod u+rx), or move it out of the data."
            ) from error
        for name, is_folder in found:
            if not is_folder:
                yield name
            elif name.rpartition("/")[2].lower() in SYSTEM_FOLDERS:
                yield f"{name}/"
            else:
                waiting.append((f"{name}/", above | {identity}))


def _shortened(path: str) -> str:
    path = text_of(path.rstrip("/"))
    return path if len(path) < 300 else f"{path[:150]}...{path[-100:]}"


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
