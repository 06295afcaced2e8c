"""Files written whole or not at all, and the folder for what may be thrown away."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from crate_mae.errors import UserError


def cache_folder() -> Path:
    """Where caches and downloads go: `$XDG_CACHE_HOME/crate-mae`, or `~/.cache/crate-mae`. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "crate-mae"
    try:
        return Path.home() / ".cache" / "crate-mae"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "crate-mae"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it.

    Missing parent folders are made.

    Raises:
        UserError: if it cannot be written (permission, full disk, a folder of that name); no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {(error.strerror or str(error)).lower()}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
