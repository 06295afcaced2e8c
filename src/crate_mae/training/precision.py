"""Number formats: which a step computes in."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs: matrix products in bfloat16, or everything in float32.

    Weights, gradients, optimizer and loss stay float32 in both. bfloat16 has the range of float32, so that no loss
    scaling is needed.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
