"""Where to compute, and under which settings of PyTorch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules with shapes but no values, on PyTorch's device "meta", without drawing random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute as this library documents, whatever the program around it has set, and leave its settings as they were.

    Inside, new tensors are float32, gradients are recorded, and nothing runs in automatic mixed precision. Afterwards
    PyTorch's default generator on the CPU, which training seeds in every step, continues where it was.
    """
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {"cpu", fastest_device().type}:
                if torch.is_autocast_enabled(kind):
                    # Without its cache: what PyTorch keeps there of weights, it forgets only when the outermost block
                    # ends, and steps inside would continue with the weights of the first one.
                    stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)
