"""Number formats: which a step computes in."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

WORTHWHILE = 1.05  # a step in bfloat16 must be this much faster, since it costs digits
_SIDE = 256


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a forward pass runs: matrix products in bfloat16, or everything in float32.

    Weights, gradients, optimizer and loss stay float32 in both. bfloat16 has the range of float32, so that no loss
    scaling is needed.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a product of matrices is not slower in bfloat16 than in float32, so that whole steps are worth timing.

    A CPU without instructions for bfloat16 takes up to 300 times as long, so that a single step would take minutes.
    Other devices are not measured, and taken to be able.
    """
    if device.type != "cpu":
        return True
    seconds = {dtype: _seconds_per_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] <= seconds[torch.float32]


def _seconds_per_product(dtype: torch.dtype) -> float:
    """The best of a few, since whatever else the machine does only ever adds to one."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)
