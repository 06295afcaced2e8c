"""Unreadable images: written down, counted, and when they are too many, a reason to stop."""

from __future__ import annotations

from collections.abc import Iterable

from crate_mae.data import BadImage
from crate_mae.data.base import most_bad
from crate_mae.errors import UserError
from crate_mae.training.files import CsvLog

_SHOWN = 3


class BadImages:
    """The distinct unreadable images of a run.

    A run may meet max_bad * max(seen, 100) of them, where `seen` is the number of distinct images it has asked for so
    far. The 100 keep one bad file at the very beginning from stopping a run; with `max_bad=0` the first one stops it.

    Args:
        table: the file bad_files.csv; what it lists is known already.
        max_bad: largest share of unreadable images.
        writes: whether this process writes the table.
    """

    def __init__(self, table: CsvLog, max_bad: float, *, writes: bool = True) -> None:
        self.table = table
        self.max_bad = max_bad
        self.writes = writes
        self.reasons = {row["location"]: row["reason"] for row in table.read()}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, step: int, found: Iterable[BadImage]) -> bool:
        """Write down images that were not known to be bad, and say whether there were any."""
        rows = []
        for location, reason in found:
            location, reason = " ".join(location.splitlines()), " ".join(reason.split())
            if location not in self.reasons:
                self.reasons[location] = reason
                rows.append({"step": step, "location": location, "reason": reason})
        if self.writes:
            self.table.append(rows)
        return bool(rows)

    def too_many(self, seen: int) -> bool:
        """Whether there are more than a run may meet among `seen` distinct images."""
        return len(self) > most_bad(self.max_bad, seen)

    def error(self, seen: int) -> UserError:
        """What to tell the user when there are too many."""
        first = "; ".join(f"{location} ({reason})" for location, reason in list(self.reasons.items())[:_SHOWN])
        return UserError(
            f"{len(self)} of the first {seen} images cannot be read, more than --max-bad {self.max_bad:g} allows.\n"
            f"They begin with {first}.\n"
            f"All are listed in {self.table.path}. Fix or remove them, or raise --max-bad."
        )
