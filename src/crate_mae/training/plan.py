"""What a run is going to do, in at most 15 lines, and what to do after it."""

from __future__ import annotations

import shlex

from crate_mae.training.images import PYTHON_OBJECT
from crate_mae.training.pretrain import Setup
from crate_mae.training.probe import ProbeResult
from crate_mae.training.progress import duration
from crate_mae.training.run import Run
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.schedule import scaled_lr

_MUCH_WAITING = 0.2


def describe_plan(setup: Setup, probe: ProbeResult, directory: RunDirectory, start_step: int) -> list[str]:
    """One line per question that a user should have the answer to before a long run."""
    config, model, images = setup.config, setup.model, setup.images
    processes = setup.accelerator.num_processes
    micro = config.batch_size // (processes * config.accumulation)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = config.image_size
    source = f"taken out of {config.data}" if images.taken_out else f"from {config.val}"
    warmup = round(config.warmup_epochs * setup.steps_per_epoch)
    lr, final = scaled_lr(config.lr, config.batch_size), scaled_lr(config.min_lr, config.batch_size)
    rows = {
        "images": f"{len(images.train):,} of {config.data}; {len(images.held_out):,} held out, {source}",
        "model": f"{config.model}, {parameters / 1e6:.2f} M parameters",
        "input": f"{height} x {width} pixels, {_count(config.channels, 'channel')}, {model.num_patches} patches of "
        f"{model.config.patch_size} x {model.config.patch_size}, {config.mask_ratio:.0%} hidden",
        "batch": f"{config.batch_size} = {micro} x {config.accumulation} accumulated x {_processes(processes)}",
        "learning rate": f"{config.lr:.3g} x {config.batch_size}/256 = {lr:.3g} after {_count(warmup, 'warm-up step')}"
        f", then by a cosine to {final:g}",
        "length": f"{_count(config.steps, 'step')} = {config.steps / setup.steps_per_epoch:.4g} epochs of "
        f"{setup.steps_per_epoch:,}",
        "precision": config.precision + (f" ({probe.reason})" if probe.reason else ""),
        "device": f"{setup.accelerator.device.type}, {_count(config.threads, 'thread')}, "
        f"{_count(config.workers, 'loader process')}" + (", compiled" if config.compile else ""),
        "estimate": _estimate(setup, probe, start_step),
        "folder": f"{directory.path}, with a checkpoint every {_count(config.checkpoint_epochs, 'epoch')} and every "
        f"{config.checkpoint_minutes:g} min",
        "to resume": directory.resume_command + " (Ctrl-C stops and saves)",
    }
    if start_step:
        rows["resuming"] = f"at step {start_step:,}"
    return [f"{key:<14} {value}" for key, value in rows.items()]


def describe_end(run: Run, seconds: float, memory: int | None) -> list[str]:
    """What came out, and what to type next."""
    directory = RunDirectory(run.path)
    losses = [row["held_out_loss"] for row in run.metrics() if row["held_out_loss"] is not None]
    waits = [row["data_wait"] for row in run.metrics() if row["data_wait"] is not None]
    folder = shlex.quote(str(run.path))
    images = "IMAGES" if run.config.data.startswith(PYTHON_OBJECT) else shlex.quote(run.config.data)
    peak = f", with at most {memory / 2**30:.1f} GiB of memory" if memory else ""
    lines = [
        f"Finished step {run.config.steps:,} after {duration(seconds)}{peak}. "
        f"Loss on held-out images: {losses[0]:.4f} before training, {losses[-1]:.4f} now.",
        f"Completed images: {directory.path / 'pictures' / f'step-{run.config.steps}.png'}",
        f"Complete others:  crate-mae reconstruct {folder} {images} --out picture.png",
        f'From Python:      model = crate_mae.load("{run.path.as_posix()}")',
    ]
    if waits and (share := sum(waits) / len(waits)) > _MUCH_WAITING:
        lines.append(f"{share:.0%} of the time was spent waiting for images: more --workers may help.")
    return lines


def _estimate(setup: Setup, probe: ProbeResult, start_step: int) -> str:
    seconds = probe.seconds * setup.config.accumulation * (setup.config.steps - start_step)
    memory = (
        f"{probe.memory / 2**30:.1f} GiB of memory" if probe.memory else "memory not measured, since a step is long"
    )
    return f"{duration(seconds)} if images load fast enough, {memory}"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def _processes(number: int) -> str:
    return _count(number, "process")
