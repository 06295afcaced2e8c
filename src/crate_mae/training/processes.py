"""The processes of a run: what they must agree on, their threads, and the signals that end them.

Processes that load images import this, too: it imports nothing of the run itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.models.devices import fastest_device, send

T = TypeVar("T")

# SIGHUP: the terminal was closed; Windows does not have it
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ECHO_SECONDS = 2.0  # in which a second signal is taken for the first one, passed on


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


def processes_here(processes: int) -> int:
    """How many processes of a launch are on this machine: as the launcher says, or else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


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

    A step waits for the device here, and nowhere else. `grad_norm` is the same in all processes; what else is given is
    what this process has found.
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
    value, mistake, failure = _attempted(decide, 0) if accelerator.is_main_process else (None, None, None)
    value, mistake = broadcast_object_list([value, mistake])
    if failure is not None:
        raise failure
    if mistake is not None:
        raise UserError(mistake)
    return value


def all_succeed(accelerator: Accelerator, act: Callable[[], T]) -> list[T]:
    """Call a function in every process, and return its values in all of them, by the number of the process.

    If it fails in one, that one raises its exception, the others a `UserError`.
    """
    value, mistake, failure = _attempted(act, accelerator.process_index)
    results = gather_object([[value, mistake]])
    if failure is not None:
        raise failure
    if found := [mistake for _, mistake in results if mistake is not None]:
        raise UserError(found[0])
    return [value for value, _ in results]


def _attempted(act: Callable[[], Any], process: int) -> tuple[Any, str | None, Exception | None]:
    """What a function returns, or a message about its exception for the other processes, and the exception itself."""
    try:
        return act(), None, None
    except UserError as error:
        return None, str(error), error
    except Exception as error:  # whatever it is, or the others would wait for this process
        return None, f"Process {process} of the run could not continue: {error}.", error


def is_of_communication(error: RuntimeError) -> bool:
    """Whether a process was lost: NCCL has an exception of its own, Gloo only its source file's name in a message."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class StopRequest:
    """The signal that asked for a stop, once there is one."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests(*, announce: bool) -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGHUP instead of ending at once, so that a step can be finished and saved.

    A later signal has its usual effect at once. One that follows within moments does not: launchers pass on to their
    processes what a terminal or SLURM has sent to all of them already. Outside the main thread, Python does not allow
    handling of signals, and nothing is changed. With `announce`, the effect of each signal is printed to the standard
    error.
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
            if announce:
                _write_at_once("Stopping after this step, and saving. Again: stop at once, and lose what is not saved.")
        elif time.monotonic() - asked_at > _ECHO_SECONDS:
            if announce:
                _write_at_once("Stopped: the steps since the last checkpoint are lost.")
            signal.signal(number, usual[signal.Signals(number)])
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, note)
    try:
        yield request
    except RuntimeError as error:
        if is_of_communication(error) and signal.SIGTERM in usual:
            # SIGTERM of the launcher: this process ends by itself, and first reports why.
            usual[signal.SIGTERM] = signal.SIG_IGN
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
