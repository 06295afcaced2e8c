"""WebDataset shards: tar files whose members are images, read in place, so that they can be read in any order."""

import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from crate_mae.data.base import NO_LABEL, EncodedSource, number_labels, path_text
from crate_mae.data.decode import MOST_BYTES, UnreadableImage, describe_unread, image_suffixes
from crate_mae.data.documents import parse_json
from crate_mae.data.files import files_fingerprint, reason_of
from crate_mae.errors import UserError, and_more, first_line

logger = logging.getLogger(__name__)

_LABEL_KEYS = ("label", "cls", "class")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # as a program writes it; 007 and ids of 30 digits are names
_MOST_LABEL_BYTES = 2**20
_MOST_HEADER_BYTES = 2**20
# Archives end with two blocks of zeros and are filled up to 10 KiB; what follows is another archive.
_AFTER_END = 64 * 1024
_MOST_LOST = 9  # images assumed lost in a damaged archive, per image that can be read


class _Member(NamedTuple):
    """One image inside a shard: the number of the shard, its name there, and where how many bytes of it are."""

    shard: int
    name: str
    offset: int
    size: int
    problem: str  # why it cannot be read; empty if it can
    is_lost: bool = False  # whether a damaged shard likely held it


class ShardSource(EncodedSource):
    """The images of uncompressed tar files, in the order of the shards and of their members.

    By the WebDataset convention, `key.cls` (a number or a name) or `key.json` (with "label", "cls" or "class") holds
    the label of the image of the same key, which ends at the first dot of the file name.

    Members that are not plain files (links, pipes, devices, sparse files) are unreadable images. A damaged shard is
    read up to the damage; the images that were likely lost are unreadable images too, so `--max-bad` decides.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths = list(paths)
        self._members: list[_Member] = []
        found: list[int | str | None] = []
        others: Counter[str] = Counter()
        for number, path in enumerate(self._paths):
            shard = _Shard(number, path)
            self._members += shard.images.values()
            found += [shard.labels.get(_key(name)) for name in shard.images]
            others += shard.others
        if not self._members:
            raise UserError(
                f"Found 0 images in {len(self._paths)} shard(s) of {name}: looked for {' '.join(image_suffixes())}; "
                f"{describe_unread(others) or 'saw no files at all'}."
            )
        there = np.array([not member.is_lost for member in self._members])
        known, classes = number_labels([found[i] for i in np.flatnonzero(there)])
        labels = None
        if known is not None:
            labels = np.full(len(there), NO_LABEL, dtype=np.int64)
            labels[there] = known
        super().__init__(name, labels, classes)
        self.left_out = dict(others.most_common())

    def __len__(self) -> int:
        return len(self._members)

    def content(self, i: int) -> bytes:
        """The bytes of image member i."""
        member = self._members[i]
        if member.problem:
            raise UnreadableImage(self.location(i), member.problem)
        try:
            # Opened each time, so that processes share no file position.
            with self._paths[member.shard].open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UnreadableImage(self.location(i), reason_of(error)) from error
        if len(content) < member.size:
            raise UnreadableImage(self.location(i), "the shard is cut short")
        return content

    def location(self, i: int) -> str:
        """Shard and member name of image i."""
        member = self._members[i]
        return f"{path_text(self._paths[member.shard])}:{path_text(PurePosixPath(member.name))}"

    def origins(self) -> Iterator[str]:
        """Shards and positions in them."""
        names = [os.path.realpath(path) for path in self._paths]
        return (f"{names[member.shard]} {member.offset}" for member in self._members)

    def fingerprint(self) -> str | None:
        """Of the shards."""
        return files_fingerprint((path.name, path) for path in self._paths)


class _Shard:
    """What one shard holds. A name that comes again stands for its last member, as when the archive is unpacked."""

    def __init__(self, number: int, path: Path) -> None:
        self.images: dict[str, _Member] = {}
        self.labels: dict[str, int | str] = {}
        self.others: Counter[str] = Counter()
        self._number = number
        self._replaced: list[str] = []
        self._bad_labels: list[str] = []
        try:
            if not path.is_file():
                raise tarfile.ReadError("not a regular file")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                end, damage = self._add_members(file, size)
        except Exception as error:  # tarfile raises nearly any type on a damaged file
            reason = reason_of(error) if isinstance(error, OSError) else first_line(error).lower()
            raise UserError(
                f"Cannot read the shard {path_text(path)}: {reason}.\n"
                "Shards are uncompressed tar files; unpack compressed ones (gunzip), and fetch broken ones again."
            ) from error
        if damage:
            self._add_lost(end, size, damage)
        self._warn(path_text(path))

    def _add_members(self, file: io.BufferedReader, size: int) -> tuple[int, str]:
        """Add the members of an archive; return where reading ended, and what is damaged there, if anything."""
        end = 0
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:") as shard:
                for info in shard:
                    if info.size < 0 or shard.offset <= end:
                        raise tarfile.ReadError("the header of a member is damaged")
                    end = shard.offset
                    self._add_member(info, file, size)
        except Exception as error:
            if not end:
                raise
            return end, first_line(error)
        return end, _damage_at(file, end)

    def _add_member(self, info: tarfile.TarInfo, file: io.BufferedReader, size: int) -> None:
        path = PurePosixPath(info.name)
        suffix = path.suffix.lower()
        if info.isdir() or path.name.startswith("."):
            return
        if suffix in image_suffixes():
            if info.name in self.images:
                self._replaced.append(info.name)
                del self.images[info.name]  # the last one keeps its own place
            self.images[info.name] = _Member(self._number, info.name, info.offset_data, info.size, _problem(info, size))
        elif suffix in (".cls", ".json"):
            label = None
            if not _problem(info, size, _MOST_LABEL_BYTES):
                file.seek(info.offset_data)
                label = _parse_label(file.read(info.size), suffix)
            if label is not None:
                self.labels[_key(info.name)] = label
            elif suffix == ".cls":
                self._bad_labels.append(info.name)
        else:
            self.others[suffix] += 1

    def _add_lost(self, end: int, size: int, damage: str) -> None:
        """Add as many unreadable images as the rest of a damaged shard likely holds, judged by the images before it."""
        read = len(self.images)
        lost = round(read * max(size - end, 0) / max(end, 1))
        problem = f"lost: the shard is damaged after byte {end:,} ({damage})"
        for count in range(1, max(1, min(lost, _MOST_LOST * read)) + 1):
            name = f"(lost image {count})"
            self.images[name] = _Member(self._number, name, end, 0, problem, is_lost=True)

    def _warn(self, shard: str) -> None:
        for names, what in (
            (self._replaced, "image(s) have the name of a later one, which takes their place"),
            (self._bad_labels, "label(s) cannot be read; an image without all of its labels has none"),
        ):
            if names:
                logger.warning("%s: %d %s: %s", shard, len(names), what, and_more(list(map(repr, names)), 3))


class _Headers(io.BufferedIOBase):
    """A file from which `tarfile` reads only headers, of limited size."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _problem(info: tarfile.TarInfo, size: int, most: int = MOST_BYTES) -> str:
    """Why the content of a member cannot be read; empty if it can."""
    if info.issparse():
        return "a sparse file in the shard, not a plain one"
    if not info.isfile():
        kind = "a link" if info.issym() or info.islnk() else "a pipe or a device"
        return f"{kind} in the shard, not a plain file"
    if info.size > most:
        return f"{info.size:,} bytes are more than the {most:,} that are read"
    return "the shard is cut short" if info.offset_data + info.size > size else ""


def _damage_at(file: io.BufferedReader, end: int) -> str:
    """What is wrong where an archive seems to end: `tarfile` takes a damaged header for the end; "" for nothing."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "it has no end: it was cut short"
    if block.strip(b"\0"):
        return "a header is damaged"
    rest = file.read(_AFTER_END)
    if rest.strip(b"\0"):
        return "another archive follows the end of the first"
    return ""


def _key(name: str) -> str:
    file = PurePosixPath(name)
    return str(file.parent / file.name.split(".", 1)[0])


def _parse_label(content: bytes, suffix: str) -> int | str | None:
    try:
        if suffix == ".json":
            described = parse_json(content, "the label")
            label = next((described[key] for key in _LABEL_KEYS if key in described), None)
            return label if isinstance(label, (int, str)) else None
        text = content.decode("utf-8").strip()
    except (ValueError, TypeError):
        return None
    return int(text) if _NUMBER.fullmatch(text) else text or None
