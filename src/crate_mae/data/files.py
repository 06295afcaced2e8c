"""Paths that users give; files written completely or not at all; digests that notice damage, or that data changed.

What has a new name is on disk before it gets that name, and the name is on disk before anything relies on it: a power
cut leaves the old file or the new one. SHA256SUMS in a folder holds the digests of its files in the format of the
program `sha256sum`, with which anybody can check them: `sha256sum --check SHA256SUMS`.
"""

import contextlib
import errno
import hashlib
import os
import re
import reprlib
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from crate_mae.errors import UserError

PYTHON_OBJECT = "python:"  # in a configuration, begins the name of data that has no path
DIGESTS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")
_MOST_BYTES = 2**20  # of SHA256SUMS: ten thousand files
UNFINISHED = ".writing-"  # how the names of folders in a folder begin that hold what is to be there
_BLOCK = 4096  # bytes of a file that a fingerprint reads at one place


def cache_folder() -> Path:
    """The folder of caches and downloads: `$XDG_CACHE_HOME/crate-mae`, or `~/.cache/crate-mae`; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "crate-mae"
    try:
        return Path.home() / ".cache" / "crate-mae"
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / "crate-mae"


def path_of(what: str, value: str | Path) -> Path:
    """The path, which need not exist, that a user gave for an option such as "--out".

    Raises:
        UserError: for an empty text, which would mean the current folder, or one that cannot be a path.
    """
    if not str(value):
        raise UserError(f"{what} is empty. Was a variable of the shell meant that is not set?")
    try:
        Path(value).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {reprlib.repr(str(value))}: {reason_of(error)}.") from error
    return Path(value)


def output_path(option: str, value: str | Path) -> Path:
    """The path of a file or folder to write; see `path_of`.

    Raises:
        UserError: also for a name that is not valid Unicode: not every library that writes there could.
    """
    path = path_of(option, value)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise UserError(f"{option} {str(path)!r} is not valid text in {encoding}: give another name.") from None
    return path


def refuse_existing(path: Path, advice: str) -> None:
    """Raise a `UserError` if there is anything at a path that is to be written; `advice` says what to give instead."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not overwritten: {advice}.")


def reason_of(error: Exception) -> str:
    """The reason of an error of the operating system in its words, or the message of another error; in lower case."""
    return str(getattr(error, "strerror", None) or error).lower()


def read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of limited size: a pipe would wait for its other end for ever, and a device never ends.

    Raises:
        OSError: if it is not a regular file, has more than `most` bytes, or cannot be read; `strerror` is the reason.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise OSError(errno.EINVAL, f"{kind}, not a regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are more than the {most:,} that are read")
    return path.read_bytes()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` when the block ends without an exception.

    Readers never see an incomplete file. Missing parent folders are created. If the block fails, nothing is left.

    Raises:
        UserError: if the file cannot be written (permission, full disk, a folder of that name).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        set_usual_mode(path.parent, temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_names(path.parent)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {reason_of(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def set_usual_mode(folder: Path, *paths: Path) -> None:
    """Give files the mode of a new one in a folder: safetensors makes files that only their owner can read."""
    new = folder / f".mode.{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # some file systems have no modes
        new.touch(exist_ok=False)
        mode = stat.S_IMODE(new.stat().st_mode)
        for path in paths:
            path.chmod(mode)
    new.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    r"""Write a file, completely or not at all; see `whole_file`.

    A text is written as UTF-8. Names of files in it may have bytes that are not: they become "\udcff".
    """
    with whole_file(path) as temporary, temporary.open("xb") as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill, which takes the name `path` when the block ends without an exception.

    If the block fails, nothing is left of it.

    Raises:
        FileExistsError: if something is at `path` in the end, and is not to be replaced: then it is left alone.
    """
    # Two programs may fill the same new folder; a folder to replace belongs to one run.
    temporary = path.with_name(f".{path.name}.{'tmp' if replace else secrets.token_hex(4)}")
    former = path.with_name(f".{path.name}.former")
    _bring_back(former, path)  # after a program that was killed while it replaced the folder
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush_folder(temporary)
        if replace and path.exists():
            # Moved aside, not removed: however long that takes, one of the two is whole.
            path.rename(former)
        elif os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "something else has taken that name meanwhile", str(path))
        temporary.rename(path)
        flush_names(path.parent)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _bring_back(former, path)
        raise


@contextlib.contextmanager
def filled_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder whose contents are in a new or empty folder when the block ends without an exception.

    A new folder comes into being as by `whole_folder`. An empty one stays what it is: it may be the current folder,
    the end of a link, or another disk, and its mode may be meant. If the block fails, it is empty again.

    Raises:
        UserError: as `refuse_used_folder`, also if the folder is used by something else in the end.
    """
    refuse_used_folder(path)
    if not path.is_dir():
        with whole_folder(path) as folder:
            yield folder
            refuse_used_folder(path)
        return
    for leftover in path.glob(f"{UNFINISHED}*"):  # of a program that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)
        _flush_folder(Path(scratch))
        refuse_used_folder(path)
        for entry in Path(scratch).iterdir():
            entry.rename(path / entry.name)
    flush_names(path)


def _flush_folder(folder: Path) -> None:
    """Give the files below a folder the usual mode, and have them and their names written to disk."""
    entries = [folder, *folder.rglob("*")]
    set_usual_mode(folder, *(entry for entry in entries if not entry.is_dir()))
    for entry in entries:
        if entry.is_dir():
            flush_names(entry)
        else:
            flush_to_disk(entry)


def _bring_back(former: Path, path: Path) -> None:
    if former.exists() and not path.exists():
        former.rename(path)


def flush_to_disk(file: Path) -> None:
    """Have the operating system write a file to disk: its new name must not reach the disk before its contents."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def flush_names(folder: Path) -> None:
    """Have the operating system write to disk which files a folder has, where it can (not on Windows)."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_digests(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS with the digests of files of a folder; those that are `known` by name are not computed again."""
    lines = [f"{(known or {}).get(name) or file_digest(folder / name)}  {name}\n" for name in sorted(names)]
    write_whole(folder / DIGESTS_FILE, "".join(lines))


def damage_of(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is damaged in a folder according to its SHA256SUMS, as the beginning of a sentence; None if nothing is.

    Without SHA256SUMS nothing is known, and so nothing is damaged. Files that it does not list are not checked; of
    those that it lists all are, or the ones with the given names.
    """
    path = folder / DIGESTS_FILE
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            lines = file.read(_MOST_BYTES).decode("ascii").splitlines()
        digests = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
        if len(digests) < len(lines) or not lines:
            return f"{DIGESTS_FILE} is damaged"
        for name in digests if names is None else [name for name in names if name in digests]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_digest(folder / name) != digests[name]:
                return f"{name} differs from its digest"
    except UnicodeDecodeError:
        return f"{DIGESTS_FILE} is damaged"
    except OSError as error:
        return f"it cannot be read ({reason_of(error)})"
    return None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_fingerprint(files: Iterable[tuple[str, Path]], blocks: int = 64) -> str | None:
    """Digest names, sizes, modification times and some bytes of files; return None if a file is not accessible.

    Times alone would not do: some file systems have none, and copies may keep those of other files.

    Args:
        files: their names in the digest, and their paths.
        blocks: how many blocks of 4 KiB are read, spread evenly from the first to the last bytes of a file.
    """
    digest = hashlib.sha256()
    try:
        for name, path in files:
            status = path.stat()
            size = status.st_size
            digest.update(os.fsencode(name) + f"\0{size} {status.st_mtime_ns}\0".encode())
            if not stat.S_ISREG(status.st_mode):
                continue
            whole = size <= blocks * _BLOCK
            with path.open("rb", buffering=0) as file:
                for start in [0] if whole else [block * (size - _BLOCK) // (blocks - 1) for block in range(blocks)]:
                    file.seek(start)
                    digest.update(file.read(size if whole else _BLOCK))
    except OSError:
        return None
    return digest.hexdigest()


def refuse_used_folder(
    path: Path, *, kind: str = "", leftovers: tuple[str, ...] = (UNFINISHED,), overwrite: bool | None = None
) -> None:
    """Raise a `UserError` for an output folder that holds other files, or that cannot be written to.

    Args:
        path: the folder, which need not exist.
        kind: what the folder may hold instead, such as "a run of crate-mae", for the message.
        leftovers: prefixes of files that an interrupted start leaves behind, which are ignored.
        overwrite: whether the folder may hold files; None if the command has no option --overwrite.
    """
    if os.path.lexists(path) and not path.is_dir():
        what = "a file" if path.exists() else "a link to nothing"
        raise UserError(f"{path} is {what}. Give a new folder with --out.")
    if not overwrite and path.exists() and any(not entry.name.startswith(leftovers) for entry in path.iterdir()):
        other = f" and not {kind}, so nothing was written there" if kind else ""
        add = "" if overwrite is None else ", or add --overwrite"
        raise UserError(f"{path} exists already: it is not empty{other}.\nGive a new folder with --out{add}.")
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"Cannot write into {above}. Give another folder with --out.")
