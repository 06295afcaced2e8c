"""Steps that do not fit in memory: refused before the first if that is certain, made smaller once if it turns out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from crate_mae.errors import UserError
from crate_mae.training.options import RunOptions
from crate_mae.training.precision import autocast
from crate_mae.training.processes import first_decides, processes_here
from crate_mae.training.sharding import sharding_of
from crate_mae.training.task import Task

# And twice as many: what an image adds, not what weights keep. Even, for images that are mixed in pairs.
_FEW_IMAGES = 2
_STATE_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments
_WORDS = ("not enough memory", "can't allocate memory", "out of memory")  # PyTorch's, on Windows, on Linux, elsewhere


class StepTooLargeError(RuntimeError):
    """The first step ran out of memory."""


@contextmanager
def first_step(*, is_first: bool = True) -> Iterator[None]:
    """Tell a lack of memory in the block from all other errors, if this is the first step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_first and _is_out_of_memory(error):
            raise StepTooLargeError from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _WORDS)


def halved(config: RunOptions, processes: int) -> RunOptions:
    """The configuration with half as many images at a time, and twice as many times; the steps are the same.

    Args:
        config: of a run whose first step did not fit.
        processes: that share a batch.

    Raises:
        UserError: if a single process does not decide, or its images cannot be halved.
    """
    if processes > 1 or _at_a_time(config, processes) % (2 * config.inseparable):
        raise too_large(config, processes)
    return dataclasses.replace(config, accumulation=2 * config.accumulation)


def too_large(config: RunOptions, processes: int) -> UserError:
    """What to say when nothing more is tried."""
    return UserError(
        f"A step does not fit in memory with {_at_a_time(config, processes)} images at a time: give a larger "
        "--accumulation, a smaller --batch-size, or a smaller --model."
    )


def _at_a_time(config: RunOptions, processes: int) -> int:
    return config.batch_size // (processes * config.accumulation)


def refuse_too_large(task: Task, accelerator: Accelerator) -> None:
    """Refuse a step that certainly needs more memory than is free, which on a CPU would end in a killed process.

    Compared is the least that a step can need: weights, gradients, moments, and what its images leave for the backward
    pass, counted on a few. A real step takes up to twice that (docs/planning.md), so one that passes may still fail. A
    GPU says itself, at once and harmlessly, that it is full. All processes must call this.

    Raises:
        UserError: naming what fits.
    """
    if accelerator.device.type == "cpu" and task.config.batch_size >= 2 * _FEW_IMAGES:
        is_sharded = sharding_of(accelerator) is not None
        first_decides(accelerator, lambda: _refuse_too_large(task, accelerator.num_processes, is_sharded))


def _refuse_too_large(task: Task, processes: int, is_sharded: bool) -> None:
    config, micro, free = task.config, _at_a_time(task.config, processes), free_memory() // processes_here(processes)
    state = _STATE_BYTES * sum(parameter.numel() for parameter in task.model.parameters())
    state //= processes if is_sharded else 1
    per_image = _kept_per_image(task)
    if (needed := state + per_image * micro) <= free:
        return
    fits = max(0, int((free - state) // per_image)) // config.inseparable * config.inseparable
    divisors = (n for n in range(1, micro + 1) if micro % (n * config.inseparable) == 0)
    times = next((n for n in divisors if micro // n <= fits), None)
    advice = "give a smaller --model"
    if times is not None:
        largest = fits * processes * config.accumulation
        advice = f"give --accumulation {times * config.accumulation}, or --batch-size {largest}"
    raise UserError(
        f"A step with {micro} images at a time needs at least {needed / 2**30:.1f} GiB of memory, but "
        f"{free / 2**30:.1f} GiB are free{_for_each(processes)}: {advice}."
    )


def _for_each(processes: int) -> str:
    here = processes_here(processes)
    return f" for each of {here} processes" if here > 1 else ""


def free_memory() -> int:
    """Bytes that this machine could give to a process without swapping."""
    return psutil.virtual_memory().available


def kept_bytes(compute: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """What autograd keeps from a computation until its backward pass, beside the parameters; shared memory once."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = compute()  # while it lives, no memory is freed that another tensor could take
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del kept
    return sum(sizes.values())


def _kept_per_image(task: Task) -> float:
    """The least that an image of the task leaves for the backward pass, in whichever precision is chosen."""
    model = copy.deepcopy(task.model).train()
    model.set_grad_checkpointing(task.config.grad_checkpointing)
    precision = task.config.precision
    step_loss = task.step_loss(0)

    def kept(number: int) -> int:
        images = torch.zeros(number, model.config.in_chans, *model.config.image_size)
        labels = torch.zeros(number, dtype=torch.int64)

        def loss() -> Tensor:
            with autocast(torch.device("cpu"), precision):  # "auto" computes in float32, of which bfloat16 keeps half
                return step_loss(model, images, labels, slice(0, number))

        return kept_bytes(loss, model.parameters())

    with torch.random.fork_rng(devices=[]):
        per_image = (kept(2 * _FEW_IMAGES) - kept(_FEW_IMAGES)) / _FEW_IMAGES
    return per_image / (2 if precision == "auto" else 1)
