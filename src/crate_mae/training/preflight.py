"""What is found out before the first step: whether it compiles and fits in memory, how fast, and in which precision."""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from crate_mae.data import ImageSource, UnreadableImage
from crate_mae.data.base import fixed_sample
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.data.decode import decode
from crate_mae.data.resize import lossless_size, resized
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError, first_line
from crate_mae.training.model_state import shard, sharding_of
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import first_decides, processes_here
from crate_mae.training.task import Task

_WORTHWHILE = 1.05  # a step in bfloat16 must be this much faster, since it costs digits
_SIDE = 256  # of matrices whose product is timed
_TIMED_STEPS = 3
_FEW_TIMED_IMAGES = 8
_LONG_STEP = 5.0  # seconds; a longer step is estimated from one with few images
# And twice as many: what an image adds, not what weights keep. Even, for images that are mixed in pairs.
_FEW_COUNTED_IMAGES = 2
MUCH_WAITING = 0.2  # share of the time
_LOADED_IMAGES = 64
_REDUCED_IMAGES = 8
_MOST_LOADING_SECONDS = 5.0
_STATE_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments
_WORDS = ("not enough memory", "can't allocate memory", "out of memory")  # PyTorch's, on Windows, on Linux, elsewhere
_STATUS = Path("/proc/self/status")


def check_compiler(device: torch.device, origin: str) -> None:
    """Compile something small, on the device of the run.

    Raises:
        UserError: if that fails, for example without a C++ compiler (CPU) or without Triton (GPU).
    """
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(3, device=device))
    except Exception as error:  # of whatever class the failing part of torch.compile has
        needs = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"--compile{origin} does not work on this machine: {first_line(error)}\n"
            f"It needs {needs}: install that, or give --no-compile."
        ) from error


class StepTooLargeError(RuntimeError):
    """The first step ran out of memory."""


@contextmanager
def first_step(*, is_first: bool = True) -> Iterator[None]:
    """Raise `StepTooLargeError` for a lack of memory in the block, if this is the first step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_first and (known or any(words in str(error) for words in _WORDS)):
            raise StepTooLargeError from error
        raise


def halved(config: RunOptions, processes: int) -> RunOptions:
    """The configuration with half as many images at a time, and twice as many times.

    Raises:
        UserError: if a single process does not decide, or its images cannot be halved.
    """
    if processes > 1 or micro_batch(config, processes) % (2 * config.inseparable):
        raise too_large(config, processes)
    return dataclasses.replace(config, accumulation=2 * config.accumulation)


def too_large(config: RunOptions, processes: int) -> UserError:
    """The error to raise when nothing more is tried."""
    return UserError(
        f"A step does not fit in memory with {micro_batch(config, processes)} images at a time: give a larger "
        "--accumulation, a smaller --batch-size, or a smaller --model."
    )


def micro_batch(config: RunOptions, processes: int) -> int:
    """Images that a process computes at a time."""
    return config.batch_size // (processes * config.accumulation)


def refuse_too_large(task: Task, accelerator: Accelerator) -> None:
    """Refuse a step that certainly needs more memory than is free, which on a CPU would end in a killed process.

    Compared is the least that a step can need: weights, gradients, moments, and what its images leave for the backward
    pass, counted on a few. A real step takes up to twice that (docs/planning.md), so one that passes may still fail. A
    GPU reports by itself, at once and without harm, that it is full. All processes must call this.

    Raises:
        UserError: naming what fits.
    """
    if accelerator.device.type == "cpu" and task.config.batch_size >= 2 * _FEW_COUNTED_IMAGES:
        is_sharded = sharding_of(accelerator) is not None
        first_decides(accelerator, lambda: _refuse_too_large(task, accelerator.num_processes, is_sharded))


def _refuse_too_large(task: Task, processes: int, is_sharded: bool) -> None:
    config, micro, here = task.config, micro_batch(task.config, processes), processes_here(processes)
    free = free_memory() // here
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
    for_each = f" for each of {here} processes" if here > 1 else ""
    raise UserError(
        f"A step with {micro} images at a time needs at least {needed / 2**30:.1f} GiB of memory, but "
        f"{free / 2**30:.1f} GiB are free{for_each}: {advice}."
    )


def free_memory() -> int:
    """Bytes that a process could get on this machine without swapping."""
    return psutil.virtual_memory().available


def kept_bytes(compute: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps until the backward pass, besides the parameters; shared memory counts once."""
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
    """Lower bound of the bytes that one image leaves for the backward pass, whichever precision is chosen."""
    model = copy.deepcopy(task.model).train()
    model.set_grad_checkpointing(task.config.grad_checkpointing)
    precision = task.config.precision
    step_loss = task.step_loss(0)

    def kept(number: int) -> int:
        images = torch.zeros(number, model.config.in_chans, *model.config.image_size)
        labels = torch.zeros(number, dtype=torch.int64)

        def loss() -> Tensor:
            with autocast(torch.device("cpu"), precision):  # "auto" computes in float32; bfloat16 keeps half as much
                return step_loss(model, images, labels, slice(0, number))

        return kept_bytes(loss, model.parameters())

    with torch.random.fork_rng(devices=[]):
        per_image = (kept(2 * _FEW_COUNTED_IMAGES) - kept(_FEW_COUNTED_IMAGES)) / _FEW_COUNTED_IMAGES
    return per_image / (2 if precision == "auto" else 1)


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
    matrices = [torch.ones(_SIDE, _SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    # The best of a few, since whatever else the machine does only ever adds to one.
    float32, bfloat16 = (min(timeit.repeat(partial(torch.mm, x, x), number=1, repeat=4)) for x in matrices)
    return bfloat16 <= float32


class ProbeResult(NamedTuple):
    """The result of the probe.

    Attributes:
        precision: the precision to use.
        reason: why, in a few words; empty if it was given.
        seconds: one forward and backward pass over a micro-batch with an optimizer step, without loading images.
        loading: seconds to read and prepare one image, in one process.
        memory: bytes at the peak, on the GPU if there is one; None if it was not measured at full size.
        reduced: the shorter side of a copy from which no crop is enlarged, and seconds to read and prepare one image of
            it; None where reading takes little of the time.
    """

    precision: str
    reason: str
    seconds: float
    loading: float
    memory: int | None
    reduced: tuple[int, float] | None = None

    def seconds_per_step(self, config: RunOptions, processes: int) -> float:
        """Seconds of a step with its images; see `seconds_with_loading`."""
        computing = self.seconds * config.accumulation
        loading = self.loading * config.batch_size / processes / max(1, config.workers)
        return seconds_with_loading(computing, loading, config.workers)

    def waiting(self, config: RunOptions, processes: int) -> float:
        """The share of a step that is spent waiting for its images."""
        return 1 - self.seconds * config.accumulation / self.seconds_per_step(config, processes)


def seconds_with_loading(computing: float, loading: float, workers: int) -> float:
    """Seconds of a step with its images: the slower of both with loader processes, otherwise the sum."""
    return max(computing, loading) if workers else computing + loading


def probe(task: Task, images: int, accelerator: Accelerator) -> ProbeResult:
    """Time training steps on a copy of the task's model with so many random images.

    Neither the model nor any random generator is changed. On a CPU "auto" takes whichever precision is faster when
    measured; on other devices it takes bfloat16 where the hardware has it. The first process measures, or all of them
    together a model that is sharded. All must call this, and get the same.

    Raises:
        UserError: if bfloat16 is asked of a GPU that does not compute in it.
    """
    first = partial(first_decides, accelerator)
    precision, reason = first(lambda: _choose_precision(task.config.precision, accelerator.device))
    measure = partial(_measured, task, images, accelerator, precision, reason)
    if sharding_of(accelerator) is None:
        return first(measure)
    found = measure()
    return first(lambda: found)


def _choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """Choose a precision without timing steps, with the reason: float32, bfloat16 or still "auto"."""
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


def faster_precision(float32: float, bfloat16: float) -> str:
    """The precision to use, from the seconds of a step in each."""
    return "bfloat16" if float32 / bfloat16 > _WORTHWHILE else "float32"


def loading_seconds(source: ImageSource, transform: Preparation) -> float:
    """Seconds to read and prepare one image: the median over a fixed sample, as many as a few seconds allow."""
    times: list[float] = []
    for i in fixed_sample(len(source), _LOADED_IMAGES):
        with suppress(UnreadableImage):
            times.append(_seconds_to_prepare(partial(source.read, i), transform))
        if sum(times) > _MOST_LOADING_SECONDS:
            break
    return statistics.median(times) if times else 0.0


def _seconds_to_prepare(read: Callable[[], Any], transform: Preparation) -> float:
    started = time.perf_counter()
    image = read()
    with default_generator_seeded(0):
        transform(image)
    return time.perf_counter() - started


def _reduced_loading(task: Task) -> tuple[int, float] | None:
    """The size of a copy without loss for the crops of a task, and seconds to read and prepare one image of it.

    The copies of a few images are made in memory. None if none of them can be read.
    """
    source, transform = task.images.train, task.transform()
    size = lossless_size(task.model.config.image_size, task.config.min_crop)
    times: list[float] = []
    for i in fixed_sample(len(source), _REDUCED_IMAGES):
        with suppress(UnreadableImage):
            content, _ = resized(source, i, size)
            times.append(_seconds_to_prepare(partial(decode, content, source.location(i)), transform))
    return (size, statistics.median(times)) if times else None


def _measured(task: Task, images: int, accelerator: Accelerator, precision: str, reason: str) -> ProbeResult:
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tried, memories = {}, {}
        for each in ("float32", "bfloat16") if precision == "auto" else (precision,):
            restart_peak_on(device)
            tried[each], full_size = _seconds_per_step(task, images, each, accelerator)
            memories[each] = peak_on(device) if full_size else None
    if precision == "auto":
        precision = faster_precision(tried["float32"], tried["bfloat16"])
        reason = f"a step takes {tried['float32']:.3g} s in float32, {tried['bfloat16']:.3g} s in bfloat16"
    seconds, memory = tried[precision], memories[precision]
    loading = loading_seconds(task.images.train, task.transform())
    found = ProbeResult(precision, reason, seconds, loading, memory)
    if task.images.train.check_command and found.waiting(task.config, accelerator.num_processes) > MUCH_WAITING:
        found = found._replace(reduced=_reduced_loading(task))
    return found


def _seconds_per_step(task: Task, images: int, precision: str, accelerator: Accelerator) -> tuple[float, bool]:
    """Seconds for a step, and whether it was measured with all images.

    This process measures alone, or of a sharded model all processes together.
    """
    device, settings = accelerator.device, sharding_of(accelerator)
    trial = copy.deepcopy(task.model).train()
    trial.set_grad_checkpointing(task.config.grad_checkpointing)
    if settings is None:
        trial.to(device)
    else:
        shard(trial, accelerator, settings)
    optimizer, step_loss = task.optimizer(trial), task.step_loss(0)

    def step(number: int) -> float:
        pixels = torch.randn(number, trial.config.in_chans, *trial.config.image_size, device=device)
        labels = torch.zeros(number, dtype=torch.int64, device=device)
        started = time.perf_counter()
        with autocast(device, precision):
            loss = step_loss(trial, pixels, labels, slice(0, number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        if settings is None:
            return seconds
        mine = torch.tensor(seconds, device=device)  # all processes must take the same decisions
        return float(cast(torch.Tensor, accelerator.reduce(mine, "mean")))

    few = min(_FEW_TIMED_IMAGES, images)
    step(few)  # warms up
    estimate = step(few) * images / few
    if estimate > _LONG_STEP:
        return estimate, few == images
    step(images)  # the first of a size allocates its memory
    return statistics.median(step(images) for _ in range(_TIMED_STEPS)), True


def peak_on(device: torch.device) -> int | None:
    """Bytes at the peak so far: of the GPU if there is one, else of this process; None where it is not known."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def restart_peak_on(device: torch.device) -> None:
    """Forget the peak so far, of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        restart_peak()


def peak_memory() -> int | None:
    """The most bytes since the start of the process, or since `restart_peak`; None where they are not counted."""
    if _STATUS.exists():
        # Not getrusage: its peak of a new process is at least what the process that started it had.
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> int | None:
    """Forget the peak so far, which imports may have set; bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # macOS, or not allowed in this container: what lies under the imports' own peak is not seen
        return peak_memory()
    return _status("VmRSS")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, "proc(5) promises it"
    return int(found[1]) * 1024
