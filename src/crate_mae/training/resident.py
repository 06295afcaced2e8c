"""Resident memory of this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int | None:
    """The most bytes since the start of the process, or since `restart_peak`; None where nobody counts them."""
    if _STATUS.exists():
        # Not getrusage: its peak of a new process is at least what the process that started it had.
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> int | None:
    """Forget the peak so far, which imports may have set; bytes now."""
    if not _STATUS.exists():
        return peak_memory()  # macOS: what lies under the imports' own peak is not seen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed in this container: as on macOS
        return peak_memory()
    return _status("VmRSS")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, "proc(5) promises it"
    return int(found[1]) * 1024
