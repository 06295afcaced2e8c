"""Open DATA: from what the user wrote to an image source."""

import logging
import math
import os
import re
from itertools import product
from pathlib import Path

from torch.utils.data import Dataset, IterableDataset

from crate_mae.data.base import ImageSource, printable
from crate_mae.data.decode import OPTIONAL, describe_unread, image_suffixes, may_be_image
from crate_mae.data.files import path_of, reason_of
from crate_mae.data.folder import SPLIT_NAMES, FolderSource, list_folder
from crate_mae.data.named import DigitsSource, HubSource, open_torchvision
from crate_mae.data.parquet import ParquetSource
from crate_mae.data.shards import ShardSource
from crate_mae.data.wrapped import DatasetSource, Indexable
from crate_mae.errors import UserError, nearest

logger = logging.getLogger(__name__)

FORMS = (
    "Data is a folder of images, an image, a .parquet file or a folder of them, .tar shards (path, glob, or\n"
    "{000..009}), hf:name[:split], torchvision:CIFAR10[:split], digits, or from Python a torch.utils.data.Dataset."
)
_MOST_FILES = 1_000_000  # that a pattern may stand for
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
        _warn_of_images(source)
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
    if isinstance(data, str) and text.partition(":")[0] in _PREFIXES:
        kind, _, rest = text.partition(":")
        folder, colon, split = rest.partition(":")
        return f"hf:{Path(folder).resolve()}{colon}{split}" if kind == "hf" and Path(folder).is_dir() else text
    path = Path(os.path.expanduser(text))  # noqa: PTH111  # Path's own raises for a user who is not known
    # Path's own `exists` raises for a name that is too long.
    return str(path.resolve()) if os.path.exists(path) or _PATTERN.search(text) else text  # noqa: PTH110


def _open_text(data: str) -> ImageSource:
    if not data.strip():
        raise UserError(f"The data has an empty name.\n{FORMS}")
    prefix, *rest = data.split(":")
    if prefix == "digits" and len(rest) <= 1:
        return DigitsSource(*rest)
    if prefix == "hf" and rest and rest[0]:
        name, _, split = data.removeprefix("hf:").partition(":")
        return HubSource(name, split or None)
    if prefix == "torchvision" and rest and rest[0]:
        name, _, split = data.removeprefix("torchvision:").partition(":")
        return open_torchvision(name, split or None)
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
        raise UserError(f"Cannot access {printable(path)}: {reason_of(error)}.") from error
    if path.exists():
        raise UserError(f"{printable(path)} is a pipe, a socket or a device, not a regular file or a folder.\n{FORMS}")
    if _PATTERN.search(name):
        return _open_files(_expand(str(path)), name)
    raise _not_found(path, name)


def _open_folder(path: Path, name: str) -> ImageSource:
    images, containers, others = list_folder(path)
    if images:
        source = FolderSource(path, images, name)
        source.left_out = others
        return source
    for suffix, kind in ((".parquet", ParquetSource), (".tar", ShardSource)):
        found = [path / file for file in containers if file.lower().endswith(suffix)]
        if found:
            return kind(_training_part(found), name)
    message = (
        f"Found 0 images under {printable(path)}: looked for {' '.join(image_suffixes())}; "
        f"{describe_unread(others) or 'saw no files at all'}."
    )
    if ".arrow" in others:
        message += f"\nFolders saved by the datasets library are opened as hf:{printable(path)}"
    raise UserError(message)


def _warn_of_images(source: ImageSource) -> None:
    """Name what is left out although it may well be images."""
    found = {suffix: count for suffix, count in source.left_out.items() if may_be_image(suffix)}
    if found:
        logger.warning("%s: %s.", source.name, describe_unread(found))


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
            raise UserError(f"{printable(paths[0])} is a file of the format {form}, which is not read here: {remedy}")
    if len(paths) == 1:
        raise UserError(f"{printable(paths[0])} is not an image, a .parquet file or a .tar shard.\n{FORMS}")
    raise UserError(f"{name} stands for {len(paths)} files that are neither all .parquet nor all .tar.\n{FORMS}")


def _training_part(paths: list[Path]) -> list[Path]:
    """Return the files of the split `train` if the file names contain several splits; otherwise all."""
    splits = [re.split(r"[-_.]", path.name.lower())[0] for path in paths]
    if len(set(splits)) > 1 and "train" in splits and set(splits) <= SPLIT_NAMES:
        return [path for path, split in zip(paths, splits, strict=True) if split == "train"]
    return paths


def _expand(pattern: str) -> list[Path]:
    """Return the files that match a pattern with globs and brace ranges, in order."""
    paths: list[Path] = []
    for text in _expand_braces(pattern):
        if re.search(r"[*?\[]", text):
            anchor = Path(Path(text).anchor)
            found = sorted(anchor.glob(str(Path(text).relative_to(anchor))))
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
    prefix, colon, rest = name.partition(":")
    near = nearest(prefix, _PREFIXES, similarity=0.7)
    if near and (colon or near == "digits"):
        return UserError(f'"{name}" is neither a path nor a known form. Did you mean {near}{colon}{rest}?\n{FORMS}')
    if re.match(r"[A-Za-z][A-Za-z0-9+]+:", name):
        return UserError(f'"{name}" is neither a path nor a known form.\n{FORMS}')
    above = path.parent
    try:
        near = nearest(path.name, [entry.name for entry in above.iterdir()], similarity=0.7)
    except OSError:
        while not above.exists() and above != above.parent:
            above = above.parent
        return UserError(f"{printable(path)} does not exist (nor does its folder; {printable(above)} does).\n{FORMS}")
    hint = f" Did you mean {printable(above / near)}?" if near else ""
    return UserError(f"{printable(path)} does not exist.{hint}\n{FORMS}")
