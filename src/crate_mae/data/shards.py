"""WebDataset shards: tar files whose members are images, read in place, so that they can be read in any order."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from crate_mae.data.base import EncodedSource, files_fingerprint, number_labels, printable
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.folder import IMAGE_SUFFIXES
from crate_mae.errors import UserError

_LABEL_KEYS = ("label", "cls", "class")


class Member(NamedTuple):
    """One image inside a shard: number of the shard, name in it, and position of its bytes."""

    shard: int
    name: str
    offset: int
    size: int


class ShardSource(EncodedSource):
    """The images of uncompressed tar files, in the order of the shards and of their members.

    By the WebDataset convention, `key.cls` (a number or a name) or `key.json` (with "label", "cls" or "class") holds
    the label of the image of the same key, which ends at the first dot of the file name.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths = list(paths)
        self._members: list[Member] = []
        found: list[int | str | None] = []
        for number, path in enumerate(self._paths):
            members, labels = _index(number, path)
            self._members += members
            found += labels
        if not self._members:
            raise UserError(f"Found 0 images in {len(self._paths)} shard(s) of {name}: looked for {_suffixes()}.")
        super().__init__(name, *number_labels(found))

    def __len__(self) -> int:
        return len(self._members)

    def content(self, i: int) -> bytes:
        """The bytes of image member i."""
        member = self._members[i]
        try:
            # Opened each time, so that processes share no file position.
            with self._paths[member.shard].open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UnreadableImage(self.location(i), (error.strerror or str(error)).lower()) from error
        if len(content) < member.size:
            raise UnreadableImage(self.location(i), "the shard is cut short")
        return content

    def location(self, i: int) -> str:
        """Shard and member name of image i."""
        member = self._members[i]
        return f"{printable(self._paths[member.shard])}:{printable(PurePosixPath(member.name))}"

    def fingerprint(self) -> str | None:
        """Of the shards."""
        return files_fingerprint(self._paths)


def _index(number: int, path: Path) -> tuple[list[Member], list[int | str | None]]:
    """List the image members of one shard, and their labels as found."""
    members: list[Member] = []
    labels: dict[str, int | str | None] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for info in shard:
                file = PurePosixPath(info.name)
                if not info.isfile() or file.name.startswith("."):
                    continue
                suffix = file.suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    members.append(Member(number, info.name, info.offset_data, info.size))
                elif suffix in (".cls", ".json"):
                    content = shard.extractfile(info)
                    assert content is not None, "a regular member has content"
                    label = _parse_label(content.read(), suffix)
                    if label is not None:
                        labels[_key(info.name)] = label
            _check_end(path, shard.offset)
    except (OSError, tarfile.TarError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"Cannot read the shard {printable(path)}: {reason.lower()}.\n"
            "Shards are uncompressed tar files; unpack compressed ones (gunzip), and fetch broken ones again."
        ) from error
    return members, [labels.get(_key(member.name)) for member in members]


def _check_end(path: Path, offset: int) -> None:
    """Raise an error for a damaged header, which `tarfile` mistakes for the end and would lose images silently."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut short at byte {offset}")


def _key(name: str) -> str:
    file = PurePosixPath(name)
    return str(file.parent / file.name.split(".", 1)[0])


def _parse_label(content: bytes, suffix: str) -> int | str | None:
    try:
        text = content.decode("utf-8").strip()
        if suffix == ".json":
            described = json.loads(text)
            label = next((described[key] for key in _LABEL_KEYS if key in described), None)
            return label if isinstance(label, (int, str)) else None
    except (ValueError, TypeError):
        return None
    try:
        return int(text)
    except ValueError:
        return text or None


def _suffixes() -> str:
    return " ".join(IMAGE_SUFFIXES)
