"""A few timed steps before a run begins: which precision is faster here, how long it will take, how much memory."""

from __future__ import annotations

import copy
import statistics
import time
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from crate_mae.errors import UserError
from crate_mae.training.precision import WORTHWHILE, autocast, multiplies_in_bfloat16
from crate_mae.training.processes import first_decides
from crate_mae.training.resident import peak_memory
from crate_mae.training.sharding import shard, sharding_of
from crate_mae.training.task import Task

Precision = Literal["float32", "bfloat16"]

_TIMED_STEPS = 3
_FEW_IMAGES = 8
_LONG_STEP = 5.0  # seconds; a longer step is estimated from one with few images


class ProbeResult(NamedTuple):
    """What the probe found out.

    Attributes:
        precision: the precision to use.
        reason: why, in a few words; empty if it was given.
        seconds: one forward and backward pass over a micro-batch with an optimizer step, without loading images.
        memory: bytes at the peak, on the GPU if there is one; None if it was not measured at full size.
    """

    precision: Precision
    reason: str
    seconds: float
    memory: int | None


def probe(task: Task, micro_batch: int, accelerator: Accelerator) -> ProbeResult:
    """Time training steps on a copy of the task's model with random images.

    Neither the model nor any random generator is changed. On a CPU "auto" takes whichever precision is faster when
    measured; on other devices it takes bfloat16 where the hardware has it. The first process measures, or all of them
    together a model that is sharded. All must call this, and get the same.

    Raises:
        UserError: if bfloat16 is asked of a GPU that does not compute in it.
    """
    first = partial(first_decides, accelerator)
    precision, reason = first(lambda: _choose_precision(task.config.precision, accelerator.device))
    settings = sharding_of(accelerator)

    def measure() -> ProbeResult:
        return _measured(task, micro_batch, _Stepper(accelerator, settings), precision, reason)

    if settings is None:
        return first(measure)
    found = measure()
    return first(lambda: found)


def _choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """What is clear without timing steps, and why: float32, bfloat16 or still "auto"."""
    if device.type == "cpu":
        if asked == "float32" or multiplies_in_bfloat16(device):
            return asked, ""
        reason = "this CPU multiplies more slowly in bfloat16"
        return ("float32", reason) if asked == "auto" else (asked, f"as asked, though {reason}")
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto" and has_bfloat16:
        return "bfloat16", "this GPU computes in it"
    if asked == "auto":
        return "float32", f"this {device.type} device does not compute in bfloat16"
    if asked == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        raise UserError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: give --precision float32.")
    return asked, ""


class _Stepper(NamedTuple):
    """How to time steps: by this process alone, or of a sharded model by all processes together."""

    accelerator: Accelerator
    settings: FullyShardedDataParallelPlugin | None

    def place(self, model: Any) -> Any:
        """Put a model where it is trained."""
        if self.settings is None:
            return model.to(self.accelerator.device)
        shard(model, self.accelerator, self.settings)
        return model

    def agree(self, seconds: float) -> float:
        """The same time in all processes, which must take the same decisions."""
        if self.settings is None:
            return seconds
        mine = torch.tensor(seconds, device=self.accelerator.device)
        return float(cast(torch.Tensor, self.accelerator.reduce(mine, "mean")))


def _measured(task: Task, micro_batch: int, stepper: _Stepper, precision: str, reason: str) -> ProbeResult:
    device = stepper.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if precision != "auto":
            seconds, full_size = _seconds_per_step(task, micro_batch, precision, stepper)
        else:
            slow, full_size = _seconds_per_step(task, micro_batch, "float32", stepper)
            fast, _ = _seconds_per_step(task, micro_batch, "bfloat16", stepper)
            precision = "bfloat16" if slow / fast > WORTHWHILE else "float32"
            reason = f"a step takes {slow:.3g} s in float32, {fast:.3g} s in bfloat16"
            seconds = min(slow, fast) if precision == "bfloat16" else slow
    return ProbeResult(cast(Precision, precision), reason, seconds, peak_on(device) if full_size else None)


def _seconds_per_step(task: Task, micro_batch: int, precision: str, stepper: _Stepper) -> tuple[float, bool]:
    """Seconds for a step, and whether it was measured with the whole micro-batch."""
    device, trial = stepper.accelerator.device, copy.deepcopy(task.model)
    trial.set_grad_checkpointing(task.config.grad_checkpointing)
    trial = stepper.place(trial).train()
    optimizer, step_loss = task.optimizer(trial), task.step_loss(0)

    def step(num_images: int) -> float:
        images = torch.randn(num_images, trial.config.in_chans, *trial.config.image_size, device=device)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        started = time.perf_counter()
        with autocast(device, precision):
            loss = step_loss(trial, images, labels, slice(0, num_images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return stepper.agree(time.perf_counter() - started)

    few = min(_FEW_IMAGES, micro_batch)
    step(few)  # warms up
    estimate = step(few) * micro_batch / few
    if estimate > _LONG_STEP:
        return estimate, few == micro_batch
    step(micro_batch)  # the first of a size allocates its memory
    return statistics.median(step(micro_batch) for _ in range(_TIMED_STEPS)), True


def peak_on(device: torch.device) -> int | None:
    """Bytes at the peak so far: of the GPU if there is one, else of this process; None where nobody can tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
