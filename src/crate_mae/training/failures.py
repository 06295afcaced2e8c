"""Errors that end a run from outside: files that can no longer be written, and processes that were ended.

A run can always be continued from its last checkpoint, so each message says how.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from crate_mae.data.dataset import explain_lost
from crate_mae.errors import UserError
from crate_mae.models.checkpoints import list_checkpoints
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import is_of_communication
from crate_mae.training.run_directory import RunDirectory

_REASONS = {  # where the system's own words are not plain
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file would exceed the size limit",
}
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space, or ask for a larger quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f unlimited)",
    errno.EROFS: "Remount the file system for writing",
    errno.EACCES: "Allow writing there again",
    errno.EPERM: "Allow writing there again",
    errno.ENOENT: "Put the folder back",
    errno.ENOTDIR: "Put the folder back",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the network drive",
}


@contextmanager
def explain_end(accelerator: Accelerator, config: RunOptions) -> Iterator[None]:
    """Turn errors from outside into a `UserError` that says what is saved of the run and how to continue.

    These are the end of a process that loads images, the loss of another training process, and errors in writing files.
    """
    try:
        yield
    except Exception as error:
        message = (
            _lost_loader(error, config) or _lost_process(error, accelerator, config) or _failed_writing(error, config)
        )
        if not message:
            raise
        raise UserError(message) from error


def _lost_loader(error: Exception, config: RunOptions) -> str | None:
    """PyTorch notices such an end by a signal, and so raises its error in whatever the main thread is doing."""
    if not isinstance(error, (RuntimeError, UserError)):
        return None
    cause = error.__cause__
    message = explain_lost(error) or (explain_lost(cause) if cause else None)
    if isinstance(cause, (EOFError, ConnectionError)):
        message = str(error)
    return f"{message}\n{_saved(config)} To continue: {config.resume_command}" if message else None


def _lost_process(error: Exception, accelerator: Accelerator, config: RunOptions) -> str | None:
    if accelerator.num_processes == 1 or not isinstance(error, RuntimeError) or not is_of_communication(error):
        return None
    return (
        f"Process {accelerator.process_index} of {accelerator.num_processes} lost contact with another process, which "
        "exited or cannot be reached; see the launcher's output and log.\nThe run is as it was at its last checkpoint. "
        f"To continue: {config.resume_command}, launched as before or not"
    )


def _failed_writing(error: Exception, config: RunOptions) -> str | None:
    directory = RunDirectory(Path(config.out))
    number = _error_number(error, directory.path)
    if number is None:
        return None
    directory.check_present()
    reason = _REASONS.get(number, os.strerror(number).lower())
    return (
        f"The files of the run in {directory.path} cannot be written: {reason}. The run has stopped. "
        f"{_saved(config)}\n{_REMEDIES[number]}, then: {config.resume_command}"
    )


def _saved(config: RunOptions) -> str:
    kept = list_checkpoints(Path(config.out))
    return f"Everything up to {kept[0].name} is saved." if kept else "It had no checkpoint yet."


def _error_number(error: BaseException, run: Path) -> int | None:
    """The operating system's number of an error in writing the files of a run; None for every other error.

    Exceptions of safetensors have no number, only the system's message. One that was raised from another is judged by
    its cause.
    """
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return error.errno if error.errno in _REMEDIES and (is_full or _is_inside(error, run)) else None
    if isinstance(error, SafetensorError):
        return next((number for number in _REMEDIES if os.strerror(number) in str(error)), None)
    return None if error.__cause__ is None else _error_number(error.__cause__, run)


def _is_inside(error: OSError, run: Path) -> bool:
    """Whether an error is about a file of a run; one in writing an open file names no file."""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return not names or any(path.absolute().is_relative_to(run.absolute()) for path in names)
