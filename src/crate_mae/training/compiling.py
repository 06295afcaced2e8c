"""Whether `torch.compile` works on this machine, which is found out by using it."""

from __future__ import annotations

import torch

from crate_mae.errors import UserError, first_line


def check_compiler(device: torch.device) -> None:
    """Compile something small, on the device of the run.

    Raises:
        UserError: if that fails, such as for want of a C++ compiler (CPU) or of Triton (GPU).
    """
    try:
        torch.compile(_double)(torch.ones(3, device=device))
    except Exception as error:  # of whatever class the failing part of torch.compile has
        needs = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"--compile does not work on this machine: {first_line(error)}\n"
            f"It needs {needs}: install that, or leave --compile out."
        ) from error


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
