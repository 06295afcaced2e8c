"""Open DATA: turn what the user wrote into an image source, most often a folder of images."""

import csv
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath

from torch.utils.data import Dataset, IterableDataset

from crate_mae.data.base import EncodedSource, ImageSource, number_labels, path_text, read_file, text_of
from crate_mae.data.decode import OPTIONAL, describe_unread, image_suffixes, may_be_image
from crate_mae.data.files import files_fingerprint, path_of, reason_of
from crate_mae.data.parquet import HubSource, ParquetSource
from crate_mae.data.shards import ShardSource
from crate_mae.data.wrapped import DatasetSource, DigitsSource, Indexable, open_torchvision
from crate_mae.errors import UserError, first_line, nearest, suggestion

logger = logging.getLogger(__name__)

FORMS = (
    "Data is a folder of images, an image, a .parquet file or a folder of them, .tar shards (path, glob, or\n"
    "{000..009}), hf:name[:split], torchvision:CIFAR10[:split], digits, or from Python a torch.utils.data.Dataset."
)
_MOST_FILES = 1_000_000  # that a pattern may stand for
_MOST_FOLDERS = 1_000_000  # links among folders can make far more of a few
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
# Made by file managers, operating systems and network drives; some hold small copies of the images.
_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
)
METADATA, METADATA_COLUMNS = "metadata.csv", ("file_name", "label")  # as for the `datasets` library
_FILE_BLOCKS = 2  # that a fingerprint reads of each image
_PREFIXES = ("hf", "torchvision", "digits")
_PATTERN = re.compile(r"[*?\[{]")


def open_source(data: str | Path | Dataset | Indexable | ImageSource) -> ImageSource:
    """Open any form of DATA.

    | DATA | images |
    |---|---|
    | a folder | its images at any depth; of a folder with only parquet files or only tar shards, those |
    | an image file | that one image |
    | `*.parquet` | rows in the layout of Hugging Face (`image: {bytes, path}`, `label`), or with a binary column |
    | `*.tar` | WebDataset shards |
    | `hf:name[:split]` | a data set of the hub or a local folder for the `datasets` library; `train` by default |
    | `torchvision:CIFAR10[:split]` | a data set of torchvision, downloaded at the first use |
    | `digits[:train]`, `digits[:test]` | scikit-learn's digits; for a folder of that name write `./digits` |
    | a `Dataset`, list, ... | anything with a length and numbered items that are images, pairs or dicts |
    | an `ImageSource` | itself |

    Paths may be globs (`shards/*.tar`) and brace ranges (`shards/{000..009}.tar`). Of a folder with parquet files of
    several splits (`train-*.parquet`, `test-*.parquet`) the training files are used, so that the test set is not
    trained on by mistake; name the files to use the others.

    Raises:
        UserError: if the data does not exist, contains no image, or may not be read.
    """
    if isinstance(data, ImageSource):
        return data
    if isinstance(data, str | Path):
        path_of("DATA", data)
        source = _open_path(data, str(data)) if isinstance(data, Path) else _open_text(data)
        unread = {suffix: count for suffix, count in source.left_out.items() if may_be_image(suffix)}
        if unread:
            logger.warning("%s: %s.", source.name, describe_unread(unread))
        return source
    if isinstance(data, IterableDataset) or not isinstance(data, Indexable):
        raise UserError(
            f"A {type(data).__name__} cannot be read in any order, which exact resuming needs.\n"
            "Give a map-style data set: one with __len__ and __getitem__."
        )
    return DatasetSource(data)


def full_name(data: str | Path) -> str:
    """Return a name by which `open_source` finds the same data from any folder: absolute paths, the rest unchanged."""
    text = str(data)
    path_of("DATA", data)
    kind, _, rest = text.partition(":")
    if isinstance(data, str) and kind in _PREFIXES:
        folder, colon, split = rest.partition(":")
        is_folder = kind == "hf" and folder and Path(folder).is_dir()
        return f"hf:{Path(folder).resolve()}{colon}{split}" if is_folder else text
    path = Path(os.path.expanduser(text))  # noqa: PTH111  # Path's own raises for a user who is not known
    # Path's own `exists` raises for a name that is too long.
    return str(path.resolve()) if os.path.exists(path) or _PATTERN.search(text) else text  # noqa: PTH110


def _open_text(data: str) -> ImageSource:
    if not data.strip():
        raise UserError(f"The data has an empty name.\n{FORMS}")
    prefix, *rest = data.split(":", 2)
    if prefix == "digits" and len(rest) <= 1:
        return DigitsSource(*rest)
    if prefix in ("hf", "torchvision") and rest and rest[0]:
        name, split, *_ = (*rest, "")
        return (HubSource if prefix == "hf" else open_torchvision)(name, split or None)
    try:
        path = Path(data).expanduser()
    except RuntimeError as error:
        raise UserError(f"{data} starts with the home folder of an unknown user.") from error
    return _open_path(path, data)


def _open_path(path: Path, name: str) -> ImageSource:
    try:
        if path.is_dir():
            return _open_folder(path, name)
        if path.is_file():
            return _open_files([path], name)
    except OSError as error:  # a name too long, a folder above that may not be entered
        raise UserError(f"Cannot access {path_text(path)}: {reason_of(error)}.") from error
    if path.exists():
        raise UserError(f"{path_text(path)} is a pipe, a socket or a device, not a regular file or a folder.\n{FORMS}")
    if _PATTERN.search(name):
        return _open_files(_expand(str(path)), name)
    raise _not_found(path, name)


def _open_folder(path: Path, name: str) -> ImageSource:
    images, containers, others = _list_folder(path)
    if images:
        source = FolderSource(path, images, name, tables=_TABLES)
        source.left_out = others
        return source
    for suffix, kind in ((".parquet", ParquetSource), (".tar", ShardSource)):
        found = [path / file for file in containers if file.lower().endswith(suffix)]
        if found:
            return kind(_training_part(found, path), name)
    message = (
        f"Found 0 images under {path_text(path)}: looked for {' '.join(image_suffixes())}; "
        f"{describe_unread(others) or 'saw no files at all'}."
    )
    if ".arrow" in others:
        message += f"\nFolders saved by the datasets library are opened as hf:{path_text(path)}"
    raise UserError(message)


def _open_files(paths: list[Path], name: str) -> ImageSource:
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        return ParquetSource(paths, name)
    if suffixes == {".tar"}:
        return ShardSource(paths, name)
    if len(paths) == 1 and suffixes <= set(image_suffixes()):
        return FolderSource(paths[0].parent, [paths[0].name], name)
    for form, (optional, remedy) in OPTIONAL.items():
        if len(paths) == 1 and suffixes <= set(optional):
            raise UserError(f"{path_text(paths[0])} is a file of the format {form}, which is not read here: {remedy}")
    if len(paths) == 1:
        raise UserError(f"{path_text(paths[0])} is not an image, a .parquet file or a .tar shard.\n{FORMS}")
    raise UserError(f"{name} stands for {len(paths)} files that are neither all .parquet nor all .tar.\n{FORMS}")


def _training_part(paths: list[Path], root: Path) -> list[Path]:
    """Return the files of the split `train` if their names, or the folders in `root`, are several splits; else all."""
    splits = [re.split(r"[-_.]", path.name.lower())[0] for path in paths]
    if not set(splits) <= _SPLITS:  # perhaps in folders of splits, in which case all files may have the same names
        splits = [path.relative_to(root).parts[0].lower() for path in paths]
    if len(set(splits)) > 1 and "train" in splits and set(splits) <= _SPLITS:
        return [path for path, split in zip(paths, splits, strict=True) if split == "train"]
    return paths


def _expand(pattern: str) -> list[Path]:
    """Return the files that match a pattern with globs and brace ranges, in order."""
    paths: list[Path] = []
    for text in _expand_braces(pattern):
        if re.search(r"[*?\[]", text):
            anchor = Path(Path(text).anchor)
            try:
                found = sorted(anchor.glob(str(Path(text).relative_to(anchor))))
            except ValueError as error:  # such as **.tar
                raise UserError(f"{text} is not a valid pattern: {first_line(error)}.") from error
        else:
            found = [Path(text)] if Path(text).is_file() else []
        if not found:
            raise UserError(f"No file matches {text}" + (f" (of {pattern})." if text != pattern else "."))
        paths += found
    return paths


def _expand_braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > _MOST_FILES:
        raise UserError(f"{pattern} stands for more than {_MOST_FILES:,} files.")
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    """Expand `000..003`, a range that keeps its zeros, or `a,b`, alternatives."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    if len(last) > 18 or int(last) - int(first) > _MOST_FILES:
        raise UserError(f"{{{inside}}} stands for more than {_MOST_FILES:,} files.")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _not_found(path: Path, name: str) -> UserError:
    if path.is_symlink():
        return UserError(f"{path_text(path)} is a link to {path_text(path.readlink())}, which does not exist.")
    prefix, colon, rest = name.partition(":")
    near = nearest(prefix, _PREFIXES, similarity=0.7)
    if near and (colon or near == "digits"):
        return UserError(f'"{name}" is neither a path nor a known form.{suggestion(near + colon + rest)}\n{FORMS}')
    if re.match(r"[A-Za-z][A-Za-z0-9+]+:", name):
        return UserError(f'"{name}" is neither a path nor a known form.\n{FORMS}')
    try:
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()], similarity=0.7)
    except OSError:
        above = next(folder for folder in path.parents if folder.exists())
        return UserError(f"{path_text(path)} does not exist (nor does its folder; {path_text(above)} does).\n{FORMS}")
    hint = suggestion(near and path_text(path.parent / near))
    return UserError(f"{path_text(path)} does not exist.{hint}\n{FORMS}")


class FolderSource(EncodedSource):
    """Image files of one folder, in the order of their POSIX paths.

    Labels are the names of the top-level sub-folders, if every image is in one and there are at least two. Folders
    named like splits ("train", "val") are not classes. Without class folders, labels are read from a table in the
    folder: `metadata.csv` with the columns `file_name` and `label`, as for the `datasets` library, or the
    `val_annotations.txt` of Tiny ImageNet.

    Attributes:
        root: the folder.
        images: paths of the files in it.
        table: the name of the file that the labels are read from, if any.

    Args:
        name: for messages.
        tables: names of tables of labels to look for.

    Raises:
        UserError: if a table of labels cannot be read or lacks an image.
    """

    def __init__(self, root: Path, images: list[str], name: str, *, tables: Iterable[str] = ()) -> None:
        tops = [image.split("/", 1)[0] for image in images]
        in_folders = all("/" in image for image in images) and len(set(tops)) > 1
        are_classes = in_folders and not {top.lower() for top in tops} <= _SPLITS
        self.table, labels = (None, tops) if are_classes else _table_of_labels(root, images, tables)
        super().__init__(name, *number_labels(labels))
        self.root = root
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def content(self, i: int) -> bytes:
        """The bytes of file i."""
        return read_file(self.root / self.images[i], self.location(i))

    def location(self, i: int) -> str:
        """The path of file i."""
        return path_text(self.root / self.images[i])

    def origins(self) -> Iterator[str]:
        """The files, without links to their folder."""
        root = os.path.realpath(self.root)
        return (f"{root}/{image}" for image in self.images)

    def fingerprint(self) -> str | None:
        """Of all image files, and of the table of labels."""
        files = self.images if self.table is None else [*self.images, self.table]
        return files_fingerprint(((file, self.root / file) for file in files), _FILE_BLOCKS)


def _table_of_labels(root: Path, images: Sequence[str], tables: Iterable[str]) -> tuple[str | None, list[str]]:
    """The name of the first table of labels in a folder and the label of each image; None and [] if there is none."""
    for table in tables:
        if not (root / table).is_file():
            continue
        location = path_text(root / table)
        try:
            labels = _TABLES[table](read_file(root / table, location).decode("utf-8-sig"))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{location}, which should have the labels, is not a table of text in UTF-8.") from error
        if labels is None:
            continue
        missing = [image for image in images if not labels.get(image)]
        if missing:
            raise UserError(
                f"{location} has no label for {missing[0]} ({len(missing)} of {len(images)} images have none).\n"
                f"Add them, or move {table} away to use the images without labels."
            )
        return table, [labels[image] for image in images]
    return None, []


def _metadata_labels(text: str) -> dict[str, str] | None:
    """Labels by path; None if there is no column of labels, since the table may be about other things."""
    lines = csv.DictReader(io.StringIO(text, newline=""))
    if not {*METADATA_COLUMNS} <= set(lines.fieldnames or []):
        return None
    return {line["file_name"]: line["label"] for line in lines}


def _annotated_labels(text: str) -> dict[str, str]:
    """Labels by path, from lines of the name of a file in `images`, its class and the sides of a box."""
    lines = (line.split("\t") for line in text.replace("\r\n", "\n").split("\n"))
    return {f"images/{line[0]}": line[1] for line in lines if len(line) > 1}


_TABLES = {  # of labels, by the names of their files: of the imagefolder of Hugging Face, and of Tiny ImageNet
    METADATA: _metadata_labels,
    "val_annotations.txt": _annotated_labels,
}


def _list_folder(root: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """Relative POSIX paths of the images and of the .parquet and .tar files below a folder; and counts of other files.

    Those are counted by suffix, and folders of the system by name with "/".
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
                f"{path_text(root)} has more than {_MOST_FOLDERS:,} folders, such as {_shortened(folder)}.\n"
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
            elif name.rpartition("/")[2].lower() in _SYSTEM_FOLDERS:
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
