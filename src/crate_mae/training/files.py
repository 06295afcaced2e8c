"""Files that are written whole or not at all."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the name `path` when the block ends without an exception.

    A folder already at `path` is replaced. If the block fails, nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            flush_to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that the disk (or the user's share of it) is full.

    safetensors has no error number to look at, only the operating system's sentence. An error that explains another
    one is as full as that.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, SafetensorError):
        return any(os.strerror(number) in str(error) for number in _FULL)
    return error.__cause__ is not None and is_disk_full(error.__cause__)


class CsvLog:
    """A table in a CSV file that grows by rows while a run goes on.

    Rows are flushed as they come. The first column is the step: when a run goes back to a checkpoint, the rows after
    its step are cut off, and so is a row that was half written when the process died.

    Args:
        path: the file; it is made with the first row.
        columns: names of the columns, the first being "step".
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        assert columns[0] == "step", "rows are cut back by their step"
        self.path = path
        self.columns = tuple(columns)

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Add rows; a column that a row does not have stays empty. No value may hold a line break."""
        if not rows:
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(rows)

    def read(self) -> list[dict[str, str]]:
        """All complete rows, as text."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(complete.splitlines()))

    def cut_back(self, step: int | None) -> None:
        """Keep the rows up to and including `step`, with the columns that they have; None keeps nothing."""
        if not self.path.exists():
            return
        kept = [row for row in self.read() if step is not None and int(row["step"]) <= step]
        temporary = CsvLog(self.path.with_name(f".{self.path.name}.tmp"), list(kept[0]) if kept else self.columns)
        temporary.path.unlink(missing_ok=True)
        temporary.append(kept)
        if kept:
            temporary.path.replace(self.path)
        else:
            self.path.unlink()


def flush_to_disk(file: Path) -> None:
    """Have the operating system write a file out: its new name must not reach the disk before its contents."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
