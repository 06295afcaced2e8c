"""The processes of a run: their threads, what they must agree on, and what ends them (signals, failed writing, ...).

A run is at each moment as it was at its last checkpoint, so that each message about its end can say how to go on.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from crate_mae.data.dataset import explain_lost
from crate_mae.errors import UserError
from crate_mae.models.checkpoints import list_checkpoints
from crate_mae.models.devices import fastest_device, send
from crate_mae.training.run_directory import RunDirectory

T = TypeVar("T")

# SIGHUP: the terminal was closed; Windows does not have it
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ECHO_SECONDS = 2.0  # in which a second signal is taken for the first one, passed on
_REASONS = {  # where the system's own words are not plain
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "files may not become so large",
}
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space, or have the quota raised",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f unlimited)",
    errno.EROFS: "Have the file system mounted for writing again",
    errno.EACCES: "Allow writing there again",
    errno.EPERM: "Allow writing there again",
    errno.ENOENT: "Put the folder back",
    errno.ENOTDIR: "Put the folder back",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the network drive",
}


@contextlib.contextmanager
def computing_threads(number: int) -> Iterator[None]:
    """Set the number of CPU threads of this process for the duration of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def training_device() -> torch.device:
    """The device for training: the accelerator, or the CPU if there is none or ACCELERATE_USE_CPU is set."""
    return torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else fastest_device()


class Agreement(NamedTuple):
    """What all processes know after the gradients of a step are computed.

    Attributes:
        loss: of the global batch.
        grad_norm: of its gradients, before clipping.
        bad_images: unreadable images that the step met.
        stop: the signal that asks for a stop, or 0.
        save: whether a checkpoint is due by the clock of the first process.
    """

    loss: float
    grad_norm: float
    bad_images: int
    stop: int
    save: bool

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def processes_here(processes: int) -> int:
    """How many processes of a launch are on this machine: as the launcher says, or else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def agree(
    accelerator: Accelerator,
    *,
    loss: Float[Tensor, ""],
    grad_norm: Float[Tensor, ""],
    bad_images: int,
    stop: int,
    save: bool,
) -> Agreement:
    """Combine the results of all processes in one exchange: the mean of the losses, the sum or any of the rest.

    A step waits for the device here, and nowhere else.

    Args:
        accelerator: of the processes.
        loss: of this process's images.
        grad_norm: the same in all processes.
        bad_images: that this process met.
        stop: signal that this process received, or 0.
        save: whether this process finds a checkpoint due.
    """
    first = accelerator.is_main_process
    flags = torch.tensor([bad_images, save and first, *(stop == number for number in STOPPING)])
    losses = torch.stack([loss.float(), grad_norm.float() * first])
    mine = torch.cat([losses, send(flags.float(), loss.device)])
    together = cast(torch.Tensor, accelerator.reduce(mine, "sum"))
    total, norm, bad, due, *stops = together.tolist()
    stop = next((number for number, asked in zip(STOPPING, stops, strict=True) if asked), 0)
    return Agreement(total / accelerator.num_processes, norm, int(bad), int(stop), due > 0)


def first_decides(accelerator: Accelerator | PartialState, decide: Callable[[], T]) -> T:
    """Call a function in the first process only; all processes return its value, or raise if it does."""
    result: list = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = [decide(), None]
        except Exception as error:  # whatever it is, or the others would wait for the first process
            failure, result = error, [None, _describe_error(error, 0)]
    value, mistake = broadcast_object_list(result)
    if failure is not None:
        raise failure
    if mistake is not None:
        raise UserError(mistake)
    return value


def all_succeed(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Call a function in every process. If it fails in one, that one raises its exception, the others a `UserError`."""
    failure: Exception | None = None
    try:
        act()
    except Exception as error:  # whatever it is, or the others would wait for this process
        failure = error
    mistakes = gather_object([failure and _describe_error(failure, accelerator.process_index)])
    if failure is not None:
        raise failure
    if found := [mistake for mistake in mistakes if mistake]:
        raise UserError(found[0])


def _describe_error(error: Exception, process: int) -> str:
    """The message about an exception for the other processes."""
    return str(error) if isinstance(error, UserError) else f"Process {process} of the run could not continue: {error}."


@contextlib.contextmanager
def explain_end(accelerator: Accelerator, directory: RunDirectory) -> Iterator[None]:
    """Turn errors from outside into a `UserError` that says what is saved of the run and how to go on.

    These are errors in writing its files, the loss of another process, and the end of one that loads images.
    """
    with (
        explain_failed_writing(directory),
        _explain_lost_processes(accelerator, directory.resume_command),
        _explain_lost_loader(directory),
    ):
        yield


@contextlib.contextmanager
def _explain_lost_processes(accelerator: Accelerator, resume_command: str) -> Iterator[None]:
    """Turn errors of communication with a process that has ended into a `UserError` that explains how to continue."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_of_communication(error):
            raise
        raise UserError(
            f"Process {accelerator.process_index} of {accelerator.num_processes} has lost another one, which was ended "
            "or cannot be reached: see the output of the launcher and its log.\n"
            f"The run is as it was at its last checkpoint. To continue: {resume_command}, launched as before or not"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    """NCCL has a class of exceptions for this, Gloo only a message with the name of its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextlib.contextmanager
def explain_failed_writing(directory: RunDirectory) -> Iterator[None]:
    """Turn an error in writing the files of a run into a `UserError` that says what is saved and how to go on."""
    try:
        yield
    except Exception as error:
        number = _error_number(error, directory.path)
        if number is None:
            raise
        directory.check_present()
        reason = _REASONS.get(number, os.strerror(number).lower())
        raise UserError(
            f"The files of the run in {directory.path} cannot be written: {reason}. The run has stopped. "
            f"{_saved(directory)}\n{_REMEDIES[number]}, then: {directory.resume_command}"
        ) from error


@contextlib.contextmanager
def _explain_lost_loader(directory: RunDirectory) -> Iterator[None]:
    """Add to the message about a loader process that was ended what is saved and how to go on.

    PyTorch notices such an end by a signal, and so raises its error in whatever the main thread is doing.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:
        cause = error.__cause__
        message = explain_lost(error) or (cause and explain_lost(cause))
        if isinstance(cause, (EOFError, ConnectionError)):
            message = str(error)
        if not message:
            raise
        raise UserError(f"{message}\n{_saved(directory)} To continue: {directory.resume_command}") from error


def _saved(directory: RunDirectory) -> str:
    """A sentence about what is saved of a run."""
    kept = list_checkpoints(directory.path)
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


class StopRequest:
    """The signal that asked for a stop, once there is one."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests(*, answers: bool = False) -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGHUP instead of ending at once, so that a step can be finished and saved.

    A later signal has its usual effect at once. One that follows within moments does not: launchers pass on to their
    processes what a terminal or SLURM has sent to all of them already. Outside the main thread, Python does not allow
    handling of signals, and nothing is changed.

    Args:
        answers: whether to say on the standard error what a signal does.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual = {number: signal.getsignal(number) for number in STOPPING}
    # A shell has background jobs ignore Ctrl-C, which is meant for the foreground job, and nohup has its program ignore
    # SIGHUP: they still do.
    usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}
    asked_at = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if not request.signal:
            request.signal, asked_at = number, time.monotonic()
            if answers:
                _write_at_once("Stopping after this step, and saving. Again: stop at once, and lose what is not saved.")
        elif time.monotonic() - asked_at > _ECHO_SECONDS:
            if answers:
                _write_at_once("Stopped: the steps since the last checkpoint are lost.")
            signal.signal(number, usual[signal.Signals(number)])
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, note)
    try:
        yield request
    except RuntimeError as error:
        if _is_of_communication(error) and signal.SIGTERM in usual:
            usual[signal.SIGTERM] = (
                signal.SIG_IGN
            )  # of the launcher: this process ends by itself, and first reports why
        raise
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _write_at_once(line: str) -> None:
    """Write to the standard error past its buffer, which the interrupted code may be writing to."""
    with contextlib.suppress(OSError, ValueError):  # it is closed, or no file
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


def ignore_stop_requests(_worker: int) -> None:
    """Have a loader process ignore signals sent to the whole group; it ends when the training process ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
