"""Writing files completely or not at all, the cache folder, and the check of output folders."""

import contextlib
import errno
import os
import reprlib
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from crate_mae.errors import UserError


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
    """The path that a user gave for an option, which need not exist.

    Args:
        what: the option, such as "--out", or what the path is of.
        value: as given.

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
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise UserError(f"{what} {reprlib.repr(str(value))}: {reason}.") from error
    return Path(value)


def read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of limited size: a pipe would wait for its other end for ever, and a device never ends.

    Args:
        path: of the file, or of a link to it.
        most: bytes.

    Raises:
        OSError: if it is no regular file, larger, or cannot be read; the reason is in `strerror`.
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
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {(error.strerror or str(error)).lower()}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes to a file, completely or not at all; see `whole_file`."""
    with whole_file(path) as temporary, temporary.open("xb") as file:
        file.write(content)


def refuse_used_folder(
    path: Path, *, kind: str = "", leftovers: tuple[str, ...] = (), overwrite: bool | None = None
) -> None:
    """Raise a `UserError` for an output folder that holds other files, or that cannot be written to.

    Args:
        path: the folder, which need not exist.
        kind: what the folder may hold instead, such as "a run of crate-mae", for the message.
        leftovers: prefixes of files that an interrupted start leaves behind, which are ignored.
        overwrite: whether the folder may hold files; None if the command has no option --overwrite.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file. Give a new folder with --out.")
    if not overwrite and path.exists() and any(not entry.name.startswith(leftovers) for entry in path.iterdir()):
        other = f" and not {kind}, so nothing was written there" if kind else ""
        add = "" if overwrite is None else ", or add --overwrite"
        raise UserError(f"{path} exists already: it is not empty{other}.\nGive a new folder with --out{add}.")
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"Cannot write into {above}. Give another folder with --out.")
