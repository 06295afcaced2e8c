"""Memory of a training step: estimated without computing it, and measured in a process of its own.

`memory_estimate` takes the whole model forward and backward on tensors that have shapes but no values, and counts every
tensor (`LiveTensors`). This takes seconds for any size of model. What the forward pass saves is not the peak: the first
gradients of activations are made before anything is freed.

`step_memory` measures a real step, in a process (`python -m crate_mae.costs.memory` with JSON on its standard input),
because a process seldom returns memory, so that models measured one after another in one process would look alike.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.models.autoencoder import MaskedAutoencoder, build_without_memory
from crate_mae.models.config import ModelConfig, config_from_dict
from crate_mae.models.masking import random_mask
from crate_mae.models.monotone import retract_
from crate_mae.private_torch import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    storage_identity,
    tree_leaves,
    unset_fake_temporarily,
)
from crate_mae.training.preflight import autocast, peak_on, restart_peak

# Resident memory of a step of the smallest model beyond its tensors: kernels that oneDNN compiles, and pages of
# libraries that are touched for the first time. Measured (docs/planning.md).
LIBRARY_BYTES = {"float32": 30_000_000, "bfloat16": 50_000_000}

# Heap memory for tensors that come and go in a step, relative to their size: holes between them are too small for the
# next. Measured: 1.3 to 1.5 for most models (benchmarks/memory.py, docs/planning.md).
HEAP = 4 / 3

_MOST_IMAGES = 32  # simulated; memory grows by the same amount with every image, and is extrapolated from there
_STEPS = 3  # measured; AdamW has all its memory after the first
_CPU = torch.device("cpu")


class StepMemory(NamedTuple):
    """Bytes of one process in training.

    Attributes:
        saved: what the forward pass saves for the backward pass, the images included.
        tensors: all tensors at the peak: weights, moments of AdamW, gradients so far, activations and temporaries.
        resident: resident memory of a process on Linux at the peak, above what it had after its imports.
    """

    saved: int
    tensors: int
    resident: int


def memory_estimate(config: ModelConfig, settings: StepSettings) -> StepMemory:
    """Estimate the memory of a step of `costs.trial.TrialStep` on a CPU."""
    most = settings.batch_size
    if most <= _MOST_IMAGES:
        saved, permanent, tensors = _simulated(config, settings)
    else:
        half, whole = (_simulated(config, replace(settings, batch_size=n)) for n in (_MOST_IMAGES // 2, _MOST_IMAGES))
        share = most / _MOST_IMAGES
        saved, permanent, tensors = (round(b + (2 * share - 2) * (b - a)) for a, b in zip(half, whole, strict=True))
    resident = permanent + HEAP * (tensors - permanent) + LIBRARY_BYTES[settings.precision]
    return StepMemory(saved, tensors, round(resident))


def _simulated(config: ModelConfig, settings: StepSettings) -> tuple[int, int, int]:
    """Bytes that are saved for the backward pass, that stay from step to step, and that live at the peak."""
    without_memory = build_without_memory(config).train()
    mask = random_mask(settings.batch_size, without_memory.num_patches, settings.mask_ratio, torch.Generator())
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
        model = without_memory.to_empty(device=_CPU)
        retract_(model)  # as training does at its start, so that no pass has to orthogonalise its subspaces again
        images = torch.empty(settings.batch_size, config.in_chans, *config.image_size)
        saved, permanent = two_steps(model, images, mask, settings.precision, live)
    return saved, permanent, live.peak


def two_steps(
    model: MaskedAutoencoder, images: Tensor, mask: Tensor, precision: str, live: "LiveTensors"
) -> tuple[int, int]:
    """Take a first step inside `live` and a second, in which AdamW has its moments.

    Returns:
        bytes that the forward pass of the second step saves, and bytes that were alive before it.
    """
    moments: list[Tensor] = []
    saved = before = 0
    for _ in range(2):
        before = live.now
        with autocast(_CPU, precision):
            loss = model(images, mask=mask).loss
        saved = live.now - before
        loss.backward()
        if not moments:
            moments = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
        model.zero_grad()
    return saved, before


class LiveTensors(TorchDispatchMode):
    """Counts the memory of every tensor that is made inside this context, until it is freed.

    Inside PyTorch's `FakeTensorMode`, where tensors have shapes but no values, this takes no memory itself. Operations
    on real tensors alone are computed there nevertheless, since the values of a mask decide which patches are visible.

    Attributes:
        now: bytes alive.
        peak: the most bytes alive so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute as usual, and record the memory of the results."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_real = bool(tensors) and not any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)
        with unset_fake_temporarily() if is_real else nullcontext():
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _record(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_identity(storage), storage.nbytes()
        if key in self._alive:
            return
        self.now += size

        def freed(_storage: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)


def step_memory(config: ModelConfig, settings: StepSettings, device: torch.device, threads: int) -> int | None:
    """Measure the peak of a training step in bytes; None where that is impossible, or memory does not suffice.

    On a CPU it is resident memory above what the process has after its imports; on a GPU, memory of tensors.
    """
    request = {
        "config": config.to_dict(),
        "settings": vars(settings),
        "device": str(device),
        "threads": threads,
    }
    answer = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def main() -> None:
    """Measure what standard input asks for; write the number, or null, to standard output."""
    request: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    config, settings = config_from_dict(request["config"]), StepSettings(**request["settings"])
    before = restart_peak()
    step = TrialStep(config, settings, device)
    for _ in range(_STEPS):
        step()
    peak = peak_on(device)
    if device.type != "cuda":
        peak = None if before is None or peak is None else peak - before
    sys.stdout.write(json.dumps(peak))


if __name__ == "__main__":
    main()
