"""A few timed steps before a run begins: which precision is faster here, how long it will take, how much memory."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from typing import Literal, NamedTuple

import torch

from crate_mae.training.precision import WORTHWHILE, autocast, multiplies_in_bfloat16
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


def probe(task: Task, micro_batch: int, device: torch.device) -> ProbeResult:
    """Time training steps on a copy of the task's model with random images.

    Neither the model nor any random generator is changed. On a CPU "auto" takes whichever precision is faster when
    measured; on other devices it takes bfloat16 where the hardware has it.
    """
    precision: Literal["auto", "float32", "bfloat16"] = task.config.precision
    reason = ""
    if precision == "auto" and device.type != "cpu":
        precision, reason = _precision_of(device)
    elif precision == "auto" and not multiplies_in_bfloat16(device):
        precision, reason = "float32", "this CPU multiplies more slowly in bfloat16"
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators):
        if precision != "auto":
            seconds, full_size = _seconds_per_step(task, micro_batch, precision, device)
        else:
            slow, full_size = _seconds_per_step(task, micro_batch, "float32", device)
            fast, _ = _seconds_per_step(task, micro_batch, "bfloat16", device)
            precision = "bfloat16" if slow / fast > WORTHWHILE else "float32"
            reason = f"a step takes {slow:.3g} s in float32, {fast:.3g} s in bfloat16"
            seconds = min(slow, fast) if precision == "bfloat16" else slow
    return ProbeResult(precision, reason, seconds, peak_memory(device) if full_size else None)


def _precision_of(device: torch.device) -> tuple[Precision, str]:
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU computes in it"
    return "float32", f"this {device.type} device does not compute in bfloat16"


def _seconds_per_step(task: Task, micro_batch: int, precision: Precision, device: torch.device) -> tuple[float, bool]:
    """Seconds for a step, and whether it was measured with the whole micro-batch."""
    trial = copy.deepcopy(task.model).to(device).train()
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
        return time.perf_counter() - started

    few = min(_FEW_IMAGES, micro_batch)
    step(few)  # warms up
    estimate = step(few) * micro_batch / few
    if estimate > _LONG_STEP:
        return estimate, few == micro_batch
    step(micro_batch)  # the first of a size allocates its memory
    return statistics.median(step(micro_batch) for _ in range(_TIMED_STEPS)), True


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: of the GPU if there is one, else of this process; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
