"""What a run prints: its plan before the first step, its progress, and its result."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crate_mae.data.decode import describe_unread
from crate_mae.drawing.text import duration, plural
from crate_mae.options import origin
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.config import plain_options
from crate_mae.training.model_state import sharding_of
from crate_mae.training.options import RunOptions
from crate_mae.training.preflight import MUCH_WAITING, ProbeResult, micro_batch
from crate_mae.training.resume import describe_data_change
from crate_mae.training.run_directory import RunDirectory, numbers
from crate_mae.training.task import Task

logger = logging.getLogger(__name__)

_LONG_RUN = 3600.0  # seconds, for which few people have a computer to spare
_SECONDS_BETWEEN_LINES = 30.0
_MUCH_FASTER = 0.7  # share of the time without the copy


def describe_plan(task: Task, accelerator: Accelerator, probe: ProbeResult, start_step: int) -> dict[str, str]:
    """Describe what a run will do: one entry for each question that should have an answer before a long run."""
    config, directory, processes = task.config, task.directory, accelerator.num_processes
    lr, final = task.learning_rates
    not_read = describe_unread(task.images.train.left_out)
    epochs = "epoch" if config.checkpoint_epochs == 1 else plural(config.checkpoint_epochs, "epoch")
    rows = {
        **task.describe(),
        **({"not read": not_read} if not_read else {}),
        "batch": f"{config.batch_size}{origin(config, 'batch_size')} = {micro_batch(config, processes)} x "
        f"{config.accumulation} accumulated x {plural(processes, 'process')}",
        "learning rate": f"{config.lr:.3g} x {config.batch_size}/256 = {lr:.3g} after "
        f"{plural(task.warmup_steps, 'warm-up step')}, then by a cosine to {final:g}",
        "length": f"{plural(config.steps, 'step')} = {config.steps / task.steps_per_epoch:.4g} epochs of "
        f"{plural(task.steps_per_epoch, 'step')}",
        "precision": config.precision + (f" ({probe.reason})" if probe.reason else ""),
        "device": f"{accelerator.device.type}, {plural(config.threads, 'thread')}, "
        f"{plural(config.workers, 'loader process')}" + "".join(f", {name}" for name in _techniques(task, accelerator)),
        "estimate": _estimate(task, probe, processes, start_step),
        "folder": f"{directory.path}, with a checkpoint after every {epochs}, and at least "
        f"every {config.checkpoint_minutes:g} min",
        "to resume": config.resume_command + " (Ctrl-C stops and saves)",
    }
    if not start_step and (faster := _faster_reading(task, probe, processes)):
        rows["read faster"] = faster
    seconds = probe.seconds_per_step(config, processes) * config.steps
    if accelerator.device.type == "cpu" and seconds > _LONG_RUN and not start_step:
        rows |= {f"30-min run {n}": command for n, command in enumerate(task.shorter_commands(), start=1)}
    if start_step:
        rows["resuming"] = f"at step {start_step:,}"
    return rows


def plan_values(task: Task, accelerator: Accelerator, probe: ProbeResult, plan: Mapping[str, str]) -> dict[str, Any]:
    """A plan for programs, from that for readers.

    Returns:
        `command`; `out`; `options`, all of them by the names in config.yaml; `parameters`; `train_images` and
        `held_out_images`; `steps_per_epoch`; `processes`; `device`; `seconds_per_step` and `seconds`, estimated for all
        of the run; `memory_bytes` at the peak, null where a step is too long to be measured; and `plan`, the lines that
        are printed, by their names; and `finished`, which is false.
    """
    config, processes = task.config, accelerator.num_processes
    per_step = probe.seconds_per_step(config, processes)
    return {
        "command": config.command,
        "out": str(task.directory.path),
        "options": plain_options(config),
        "parameters": task.num_parameters,
        "train_images": len(task.images.train),
        "held_out_images": len(task.images.held_out),
        "steps_per_epoch": task.steps_per_epoch,
        "processes": processes,
        "device": accelerator.device.type,
        "seconds_per_step": per_step,
        "seconds": per_step * config.steps,
        "memory_bytes": probe.memory,
        "plan": dict(plan),
        "finished": False,
    }


def finished_values(config: RunOptions, directory: RunDirectory) -> dict[str, Any]:
    """What there is in place of `plan_values` if the run has finished: without a plan."""
    return {
        "command": config.command,
        "out": str(directory.path),
        "options": plain_options(config),
        "finished": True,
    }


def plan_lines(plan: Mapping[str, str]) -> list[str]:
    """A plan as a table of two columns."""
    return [f"{key:<14} {value}" for key, value in plan.items()]


def describe_end(task: Task, state: TrainState, memory: int | None, seconds: float) -> tuple[str, list[str]]:
    """Describe the result of a run and its peak of memory in bytes; and, line by line, what to type next."""
    directory = task.directory
    rows = numbers(directory.metrics())
    waits = [row["data_wait"] for row in rows if row["data_wait"] is not None]
    in_all = f" ({duration(state.seconds)} in total, over all starts)" if state.seconds > seconds + 1 else ""
    peak = f", peak memory {memory / 2**30:.1f} GiB" if memory else ""
    finished = f"Finished step {task.config.steps:,} after {duration(seconds)}{in_all}{peak}."
    if bad := len(directory.bad_files.read()):
        finished += f" {plural(bad, 'image')} could not be read: bad_files.csv."
    for change in directory.data_changes.read():
        finished += f" {describe_data_change(change)}"
    use = task.describe_use()
    if waits and (share := sum(waits) / len(waits)) > MUCH_WAITING:
        use = [*use, f"{share:.0%} of the time was spent waiting for images: more --workers may help."]
    return f"{finished} {task.describe_result(rows)}", use


def _techniques(task: Task, accelerator: Accelerator) -> list[str]:
    """How this run computes, where that is not the usual way."""
    techniques = {
        "compiled": task.config.compile,
        "gradient checkpointing": task.config.grad_checkpointing,
        "sharded": sharding_of(accelerator) is not None,
    }
    return [name for name, is_used in techniques.items() if is_used]


def _estimate(task: Task, probe: ProbeResult, processes: int, start_step: int) -> str:
    config = task.config
    per_step = probe.seconds_per_step(config, processes)
    memory = (
        f"{probe.memory / 2**30:.1f} GiB of memory" if probe.memory else "memory not measured, since a step is long"
    )
    waiting = probe.waiting(config, processes)
    loading = f" ({waiting:.0%} of it for reading images)" if waiting > MUCH_WAITING else ""
    return f"{duration(per_step * (config.steps - start_step))}{loading}, {memory}"


def _faster_reading(task: Task, probe: ProbeResult, processes: int) -> str:
    """The command that makes a copy from which a run is much faster; empty if it would not be."""
    if probe.reduced is None:
        return ""
    size, loading = probe.reduced
    seconds = probe._replace(loading=loading).seconds_per_step(task.config, processes)
    if seconds > _MUCH_FASTER * probe.seconds_per_step(task.config, processes):
        return ""
    command = f"crate-mae data resize {shlex.quote(task.images.train.name)} COPY --size {size}"
    return (
        f"on a copy made by `{command}` the run takes {duration(seconds * task.config.steps)}: reading an image takes "
        f"{1000 * loading:,.1f} ms there, {1000 * probe.loading:,.1f} ms here"
    )


class LastingStream:
    """A stream whose other end may go away, such as a closed terminal; what is written then is lost, not an error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if anybody reads it."""
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if anybody reads it."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class Display:
    """Prints lines before and after a run, and its progress in between; all of it goes to the log as well.

    Without a console nothing is printed. `on_progress` is called with a line about the step, twice a minute.
    """

    def __init__(self, console: Console | None, on_progress: Callable[[str], object] | None = None) -> None:
        self.console = console
        self.on_progress = on_progress
        self._bar: Progress | None = None
        self._last_line = 0.0

    def lines(self, lines: Sequence[str]) -> None:
        """Print some lines."""
        for line in lines:
            logger.info("%s", line)
            self._print(line)

    def warn(self, line: str) -> None:
        """Print a line about something that is not as it should be."""
        logger.warning("%s", line)
        self._print(line)

    def _print(self, line: str) -> None:
        if self.console is not None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def training(self, step: int, total_steps: int) -> Iterator[None]:
        """Display the progress of a block that begins at `step`."""
        self._started, self._first_step, self._total_steps = time.monotonic(), step, total_steps
        self._last_line = self._started
        if self.console is None or not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as self._bar:
                self._task = self._bar.add_task("starting", total=total_steps, completed=step)
                yield
        finally:
            self._bar = None

    def step(self, step: int, loss: float, images_per_second: float, data_wait: float) -> None:
        """Display one step: its loss, images per second, and the share of time spent waiting for images."""
        text = f"loss {loss:.4f}  {images_per_second:,.0f} images/s  data wait {data_wait:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=step)
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / (step - self._first_step) * (self._total_steps - step)
            line = f"step {step:,} of {self._total_steps:,}  {text}  {duration(left)} left"
            logger.info("%s", line)
            if self.on_progress is not None:
                self.on_progress(line)
            if self._bar is None:
                self._print(line)
