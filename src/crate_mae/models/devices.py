"""Where to compute."""

import torch


def fastest_device() -> torch.device:
    """The accelerator of this machine if it has one, else its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
