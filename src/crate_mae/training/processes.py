"""The processes of a run: what they have to agree on, their threads, and the signals that end them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from crate_mae.errors import UserError
from crate_mae.models.devices import fastest_device

T = TypeVar("T")


@contextlib.contextmanager
def computing_threads(number: int) -> Iterator[None]:
    """Have this process compute with a number of CPU threads; afterwards it is as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def training_device() -> torch.device:
    """Where a process trains: on the accelerator, unless Accelerate's ACCELERATE_USE_CPU says otherwise, or the CPU."""
    return torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else fastest_device()


class Agreement(NamedTuple):
    """What all processes know after a step's gradients are there.

    Attributes:
        loss: of the global batch.
        bad_images: unreadable images that the step met.
        stop: the signal that asks for a stop, or 0.
        save: whether a checkpoint is due by the clock of the first process.
    """

    loss: float
    bad_images: int
    stop: int
    save: bool


def agree(accelerator: Accelerator, *, loss: torch.Tensor, bad_images: int, stop: int, save: bool) -> Agreement:
    """Bring together what each process found, in one exchange: the mean of the losses, the sum or any of the rest."""
    flags = [bad_images, stop == signal.SIGINT, stop == signal.SIGTERM, save and accelerator.is_main_process]
    mine = torch.stack([loss.float(), *loss.new_tensor(flags, dtype=torch.float32)])
    together = cast(torch.Tensor, accelerator.reduce(mine, "sum"))
    total, bad, interrupted, terminated, due = together.tolist()
    stop = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
    return Agreement(total / accelerator.num_processes, int(bad), int(stop), due > 0)


def first_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Call a function in the first process only; all processes return its value, or raise its `UserError`."""
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [decide(), None]
        except UserError as error:
            outcome = [None, str(error)]
        except OSError as error:
            if accelerator.num_processes == 1:
                raise
            outcome = [None, f"The first process could not go on: {error}."]  # or the others would wait for it
    value, mistake = broadcast_object_list(outcome)
    if mistake is not None:
        raise UserError(mistake)
    return value


class StopRequest:
    """The signal that asked for a stop, once there is one."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying of them, so that a step can be finished and saved.

    A second signal has its usual effect at once. Outside the main thread, Python lets nobody handle signals, and
    nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell starts background jobs deaf to Ctrl-C, which is meant for the job in front: they stay so.
    usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def ignore_stop_requests(_worker: int) -> None:
    """Make a loader process deaf to signals sent to the whole group; it ends when the training process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
