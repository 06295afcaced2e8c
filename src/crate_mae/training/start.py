"""From checked options to a running loop: the part of a run that writes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from rich.console import Console

from crate_mae.errors import UserError
from crate_mae.models.autoencoder import build
from crate_mae.training import checkpoint
from crate_mae.training.config import PretrainConfig
from crate_mae.training.plan import describe_end, describe_plan
from crate_mae.training.pretrain import Setup, train
from crate_mae.training.probe import ProbeResult, probe
from crate_mae.training.processes import first_decides
from crate_mae.training.progress import Display
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.resolve import resolve
from crate_mae.training.run import Run
from crate_mae.training.run_directory import RunDirectory

_SECONDS_PER_CHECKPOINT = 60  # by default, short epochs share a checkpoint


def start(
    data: Any,
    out: Path,
    options: dict[str, Any],
    defaults: dict[str, Any],
    *,
    dry_run: bool,
    quiet: bool,
) -> Run:
    """Start a run, or go on with the one that is in `out`; see `crate_mae.pretrain`.

    Args:
        data: any form of DATA.
        out: the run's folder.
        options: the other options of `crate_mae.pretrain` by name.
        defaults: their defaults, which tell what the user left open.
        dry_run: stop after showing the plan.
        quiet: show nothing.
    """
    started = time.monotonic()
    directory = RunDirectory(out)
    _refuse_engines()
    existing = directory.existing_config()
    if existing is not None:
        options = _fill_from(existing, options, defaults)
    processes = PartialState().num_processes
    display = Display(Console() if PartialState().is_main_process and not quiet else None)
    config, images, model_config = resolve(data, options, processes)
    if existing is not None:
        if changed := existing.differences(config):
            raise UserError(
                f"{out} holds a run with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "To resume it, leave these options out; for a new run, give another --out."
            )
        if directory.is_finished:
            display.lines([f"The run in {out} is finished: {existing.steps:,} steps."])
            return Run(out, existing)

    with _threads(config.threads):
        accelerator = Accelerator(
            mixed_precision="no",  # the loop says itself what runs in bfloat16
            log_with=list(config.trackers),
            project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
            model = build(model_config)
        micro_batch = config.batch_size // (processes * config.accumulation)
        found = first_decides(
            accelerator,
            lambda: probe(model, micro_batch, config.mask_ratio, config.precision, accelerator.device),
        )
        config = _with_probe(config, found, len(images.train))
        setup = Setup(config, images, model, accelerator)
        newest = checkpoint.newest_checkpoint(out)
        plan = describe_plan(setup, found, directory, checkpoint.step_of(newest) if newest else 0)
        if dry_run:
            display.lines([*plan, "This was a dry run: nothing has been written."])
            return Run(out, config)
        train(setup, directory, display, plan)
        run = Run(out, config)
        if accelerator.is_main_process:
            display.lines(describe_end(run, time.monotonic() - started))
        return run


def _refuse_engines() -> None:
    """DeepSpeed and Megatron bring their own optimizer and checkpoints, which could not be resumed exactly."""
    kind = PartialState().distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"Pretraining does not run on {kind.value}. Launch it with DDP or FSDP, or plainly.")


def _fill_from(existing: PretrainConfig, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Options that were left at their default, from the run that exists."""
    filled = {**options, **dataclasses.asdict(existing)}
    del filled["data"]
    given = {key: value for key, value in options.items() if value != defaults[key]}
    if "epochs" in given:
        filled["steps"] = given.get("steps")
    return {**filled, **given}


def _with_probe(config: PretrainConfig, found: ProbeResult, images: int) -> PretrainConfig:
    """The configuration with what the probe decides."""
    seconds_per_epoch = found.seconds * config.accumulation * (images // config.batch_size)
    epochs = config.checkpoint_epochs or max(1, math.ceil(_SECONDS_PER_CHECKPOINT / seconds_per_epoch))
    return dataclasses.replace(config, precision=found.precision, checkpoint_epochs=epochs)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
