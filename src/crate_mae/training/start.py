"""From options to a running loop: everything before the first file is written."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, patch_environment

from crate_mae.data.documents import to_json
from crate_mae.data.files import output_path
from crate_mae.drawing.text import duration, plural
from crate_mae.errors import UserError
from crate_mae.models.checkpoints import newest_checkpoint, step_of
from crate_mae.options import JSON_NEEDS_DRY_RUN, origin
from crate_mae.terminal import open_console
from crate_mae.training.config import differences
from crate_mae.training.loop import train
from crate_mae.training.model_state import asked_sharding
from crate_mae.training.options import OptionsT, RunOptions
from crate_mae.training.preflight import (
    ProbeResult,
    StepTooLargeError,
    check_compiler,
    first_step,
    halved,
    micro_batch,
    probe,
    refuse_too_large,
    too_large,
)
from crate_mae.training.processes import all_succeed, computing_threads, first_decides, training_device
from crate_mae.training.progress import Display, LastingStream, describe_plan, finished_values, plan_lines, plan_values
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.resolve import resolve, with_cheaper_model
from crate_mae.training.resume import continued
from crate_mae.training.run_directory import Run, RunDirectory
from crate_mae.training.task import BuildTask, Task

# For whole models: buffers are positions, the same in all processes and constant; gradients are kept once.
WHOLE_MODELS = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
_SHARE_OF_TIME_FOR_STEPS = 0.95  # the rest is for measurements, pictures and checkpoints
_SHARE_OF_TIME_FOR_MEASURING = 0.1  # of steps with another batch
_ENOUGH_STEPS = 1000
_SMALLEST_BATCH = 32
_SECONDS_PER_CHECKPOINT = 60  # by default, short epochs share a checkpoint


def start(
    options: RunOptions, on_progress: Callable[[str], object] | None = None, *, data_changed: bool = False
) -> Run:
    """Start a run, or continue the one in `options.out`; see `crate_mae.pretrain`, `finetune` and `resume`."""
    started = time.monotonic()
    if options.json and not options.dry_run:
        raise UserError(JSON_NEEDS_DRY_RUN)
    out = output_path("--out", options.out)
    options, directory = dataclasses.replace(options, out=out), RunDirectory(out)
    processes = _join_processes()
    display = _open_display(options, processes, on_progress)
    existing = directory.existing_config()
    if existing is not None:
        options = _continued_by(options, existing, directory)
    reason, newest = first_decides(processes, lambda: _found_in(directory))
    config, build = resolve(options, processes.num_processes, newest, data_changed=data_changed)
    resolving = time.monotonic() - started
    if existing is not None:
        _refuse_differences(existing, config, directory)
        if reason is None:
            if options.json and processes.is_main_process:
                _write_json(finished_values(existing, directory))
            display.lines([f"The run in {out} is finished: {existing.steps:,} steps."])
            return Run(out, existing)
        if directory.is_finished:
            if newest is None:
                raise UserError(
                    f"The finished run in {out} is damaged: {reason}.\nIt has no checkpoint to finish it from."
                )
            display.warn(f"Finishing the run in {out} again: {reason}.")

    with computing_threads(config.threads):
        accelerator = _build_accelerator(config, processes, out)
        run = partial(_run, accelerator, display, newest=newest, started=started, data_changed=data_changed)

        def attempt(config: RunOptions) -> Run:
            if options.minutes is None:
                return run(config, build)
            in_time = _fitted_to_time(options, config, build, accelerator, started, resolving)
            return run(*resolve(in_time, processes.num_processes, newest))

        with suppress(StepTooLargeError):
            return attempt(config)
        accelerator.free_memory()
        smaller = halved(config, processes.num_processes)
        display.lines([f"A step does not fit in memory: continuing with --accumulation {smaller.accumulation}."])
        try:
            return attempt(smaller)
        except StepTooLargeError:
            raise too_large(smaller, processes.num_processes) from None


def _open_display(options: RunOptions, processes: PartialState, on_progress: Callable[[str], object] | None) -> Display:
    """What the first process prints; the others print nothing."""
    if not processes.is_main_process:
        return Display(None)
    stream = LastingStream(sys.stderr if options.json else sys.stdout)
    return Display(None if options.quiet else open_console(file=stream), on_progress)


def _write_json(values: Mapping[str, Any]) -> None:
    sys.stdout.write(to_json(values, ascii_only=True) + "\n")


def _continued_by(options: OptionsT, existing: RunOptions, directory: RunDirectory) -> OptionsT:
    """Options with those of the run that they continue, of the same command."""
    if existing.command != options.command:
        raise UserError(
            f"{options.out} holds a run of `crate-mae {existing.command}`, not of `crate-mae {options.command}`.\n"
            f"{_how_to_continue(existing)}"
        )
    if options.minutes is not None:
        raise UserError(
            f"{directory.path} already holds a run of {existing.steps:,} steps, whose length --minutes "
            f"{options.minutes:g}{origin(options, 'minutes')} cannot set.\n{_how_to_continue(existing)}"
        )
    return options.filled_from(existing)


def _refuse_differences(existing: RunOptions, config: RunOptions, directory: RunDirectory) -> None:
    if changed := differences(existing, config):
        raise UserError(
            f"{directory.path} already holds a run of {existing.steps:,} steps with other options:\n  "
            + "\n  ".join(changed)
            + f"\n{_how_to_continue(existing)}"
        )


def _how_to_continue(existing: RunOptions) -> str:
    return f"To continue that run as it is: {existing.resume_command}. For a new run, give another --out."


def _found_in(directory: RunDirectory) -> tuple[str | None, Path | None]:
    """Why a run is to be finished, None if it is complete; and its newest whole checkpoint."""
    reason = directory.why_unfinished() if directory.is_finished else ""
    return reason, directory.path if reason is None else newest_checkpoint(directory.path)


def _run(
    accelerator: Accelerator,
    display: Display,
    config: RunOptions,
    build: BuildTask,
    *,
    newest: Path | None,
    started: float,
    data_changed: bool,
) -> Run:
    """Build the task, and run it to the end."""
    task, found = _build_task(config, build, accelerator)
    start_step = step_of(newest) if newest else 0
    if newest is not None and start_step:
        task.config = continued(task, newest, data_changed=data_changed)
    plan = describe_plan(task, accelerator, found, start_step)
    if task.config.dry_run:
        if task.config.json and accelerator.is_main_process:
            _write_json(plan_values(task, accelerator, found, plan))
        display.lines([*plan_lines(plan), "This was a dry run: nothing has been written."])
    else:
        train(task, accelerator, display=display, plan=plan, newest=newest, started=started, data_changed=data_changed)
    return Run(task.directory.path, task.config)


def _build_accelerator(config: RunOptions, processes: PartialState, out: Path) -> Accelerator:
    with patch_environment(accelerate_use_fsdp="false"):  # `model_state.shard` does it, on every device
        return Accelerator(
            cpu=torch.device(processes.device or "cpu").type == "cpu",
            mixed_precision="no",  # the loop itself decides what runs in bfloat16
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
            kwargs_handlers=[WHOLE_MODELS],
        )


def _build_task(config: RunOptions, build: BuildTask, accelerator: Accelerator) -> tuple[Task, ProbeResult]:
    """Build the task with its weights, and complete its configuration with the result of the probe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
        task = build(config)
    if config.compile:
        all_succeed(accelerator, lambda: check_compiler(accelerator.device, origin(config, "compile")))
    with first_step():
        refuse_too_large(task, accelerator)
        found = probe(task, micro_batch(config, accelerator.num_processes), accelerator)
    seconds_per_epoch = found.seconds * config.accumulation * task.steps_per_epoch
    about_a_minute = max(1, math.ceil(_SECONDS_PER_CHECKPOINT / seconds_per_epoch))
    epochs = config.checkpoint_epochs or min(about_a_minute, math.ceil(config.steps / task.steps_per_epoch))
    task.config = dataclasses.replace(config, precision=found.precision, checkpoint_epochs=epochs)
    return task, found


def _fitted_to_time(
    options: OptionsT,
    config: RunOptions,
    build: BuildTask,
    accelerator: Accelerator,
    started: float,
    resolving: float,
) -> OptionsT:
    """The options with as many steps as fit into their minutes, at the speed of a few measured ones.

    Where the batch is open and few steps would fit, there are more steps of fewer images instead. These are measured
    too, if that takes little of the time; else they take as long per image. Where even these would be few, and the
    model was chosen by the size of the images, it is one for smaller images.
    """

    def measured(config: RunOptions, build: BuildTask) -> _Fit:
        before = time.monotonic()
        task, found = _build_task(config, build, accelerator)
        now = time.monotonic()
        # The run itself will resolve its options, build its task and measure steps once more.
        again = resolving + (now - before)
        seconds, preparation = first_decides(accelerator, lambda: (now - before, now - started + again))
        per_step = found.seconds_per_step(task.config, accelerator.num_processes)
        steps = (60 * options.minutes - preparation) * _SHARE_OF_TIME_FOR_STEPS / per_step
        return _Fit(seconds, preparation, per_step, steps)

    fit = measured(config, build)
    most = fit.steps if options.batch_size else max(1, config.batch_size / _SMALLEST_BATCH) * fit.steps
    if most < _ENOUGH_STEPS:
        count = plural(max(0, int(most)), "step")
        why = f"--minutes {options.minutes:g}, in which a model for larger images would take {count}"
        if cheaper := with_cheaper_model(options, config, why):
            options = cheaper
            config, build = resolve(options, accelerator.num_processes, None)
            fit = measured(config, build)
    steps, batch = fit.steps, config.batch_size
    share = 2 * accelerator.num_processes * config.accumulation * config.inseparable
    if options.batch_size is None:
        while 0 < steps < _ENOUGH_STEPS and batch > _SMALLEST_BATCH and batch % share == 0:
            batch, steps = batch // 2, 2 * steps
    if batch < config.batch_size and fit.seconds < _SHARE_OF_TIME_FOR_MEASURING * 60 * options.minutes:
        fit = measured(dataclasses.replace(config, batch_size=batch), build)
        steps = fit.steps
    if steps < 1:
        raise UserError(
            f"--minutes {options.minutes:g}{origin(options, 'minutes')} is too short: "
            f"preparing the run takes {duration(fit.preparation)}, and a step {fit.per_step:.3g} s."
        )
    fitted = {"batch_size": batch, "steps": int(steps), "accumulation": config.accumulation}
    return dataclasses.replace(options, minutes=None, **fitted)


class _Fit(NamedTuple):
    """What a measurement found: the seconds that it took, those of the run before its first step, and those of a step.

    The number of steps that fit is a fraction, and negative if not even the preparation fits.
    """

    seconds: float
    preparation: float
    per_step: float
    steps: float


def _join_processes() -> PartialState:
    """Find the other processes of a launch, if there are any.

    On a machine without accelerators, Accelerate looks for them only if it is asked to use the CPU.

    Raises:
        UserError: for an engine that is not supported.
    """
    asked_sharding()
    processes = PartialState(cpu=training_device().type == "cpu")
    if processes.num_processes > 1:
        atexit.register(_leave, processes)
    return processes


def _leave(processes: PartialState) -> None:
    """End the process group and its threads.

    Left to the end of the interpreter, a thread that then frees a Python object crashes a finished process
    ("terminate called without an active exception"). Wrapped models, which may be part of a cycle, hold the group.
    """
    gc.collect()
    processes.destroy_process_group()
