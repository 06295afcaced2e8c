"""Where to compute."""

import torch
from torch import Tensor


def fastest_device() -> torch.device:
    """The accelerator of this machine if it has one, else its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; if that is not the CPU, without waiting until it is there.

    From memory that is not pinned, CUDA copies larger tensors at once, and the caller waits.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")
