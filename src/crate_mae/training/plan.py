"""What a run is going to do, in at most 15 lines, and what to do after it."""

from __future__ import annotations

from accelerate import Accelerator

from crate_mae.training.probe import ProbeResult
from crate_mae.training.progress import count, duration
from crate_mae.training.run import Run
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.schedule import scaled_lr
from crate_mae.training.sharding import sharding_of
from crate_mae.training.task import Task

_MUCH_WAITING = 0.2


def describe_plan(
    task: Task, accelerator: Accelerator, probe: ProbeResult, directory: RunDirectory, start_step: int
) -> list[str]:
    """One line per question that a user should have the answer to before a long run."""
    config = task.config
    processes = accelerator.num_processes
    micro = config.batch_size // (processes * config.accumulation)
    warmup = round(config.warmup_epochs * task.steps_per_epoch)
    lr, final = scaled_lr(config.lr, config.batch_size), scaled_lr(config.min_lr, config.batch_size)
    rows = {
        **task.describe(),
        "batch": f"{config.batch_size} = {micro} x {config.accumulation} accumulated x {count(processes, 'process')}",
        "learning rate": f"{config.lr:.3g} x {config.batch_size}/256 = {lr:.3g} after {count(warmup, 'warm-up step')}"
        f", then by a cosine to {final:g}",
        "length": f"{count(config.steps, 'step')} = {config.steps / task.steps_per_epoch:.4g} epochs of "
        f"{task.steps_per_epoch:,}",
        "precision": config.precision + (f" ({probe.reason})" if probe.reason else ""),
        "device": f"{accelerator.device.type}, {count(config.threads, 'thread')}, "
        f"{count(config.workers, 'loader process')}" + "".join(f", {way}" for way in _ways(task, accelerator)),
        "estimate": _estimate(task, probe, start_step),
        "folder": f"{directory.path}, with a checkpoint every {count(config.checkpoint_epochs, 'epoch')} and every "
        f"{config.checkpoint_minutes:g} min",
        "to resume": directory.resume_command + " (Ctrl-C stops and saves)",
    }
    if start_step:
        rows["resuming"] = f"at step {start_step:,}"
    return [f"{key:<14} {value}" for key, value in rows.items()]


def describe_end(task: Task, run: Run, seconds: float, memory: int | None) -> list[str]:
    """What came out, and what to type next."""
    rows = run.metrics()
    waits = [row["data_wait"] for row in rows if row["data_wait"] is not None]
    peak = f", with at most {memory / 2**30:.1f} GiB of memory" if memory else ""
    result, *hints = task.describe_end(rows, run.path)
    lines = [f"Finished step {run.config.steps:,} after {duration(seconds)}{peak}. {result}", *hints]
    if waits and (share := sum(waits) / len(waits)) > _MUCH_WAITING:
        lines.append(f"{share:.0%} of the time was spent waiting for images: more --workers may help.")
    return lines


def _ways(task: Task, accelerator: Accelerator) -> list[str]:
    """What is special about how this run computes."""
    ways = {
        "compiled": task.config.compile,
        "layers computed twice": task.config.grad_checkpointing,
        "sharded": sharding_of(accelerator) is not None,
    }
    return [way for way, is_taken in ways.items() if is_taken]


def _estimate(task: Task, probe: ProbeResult, start_step: int) -> str:
    seconds = probe.seconds * task.config.accumulation * (task.config.steps - start_step)
    memory = (
        f"{probe.memory / 2**30:.1f} GiB of memory" if probe.memory else "memory not measured, since a step is long"
    )
    return f"{duration(seconds)} if images load fast enough, {memory}"
