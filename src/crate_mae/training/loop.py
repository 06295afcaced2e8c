"""The training loop, to be read from top to bottom: build, resume, step, log, save.

It serves every task. What pretraining and fine-tuning do differently is in `pretraining` and `finetuning`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from crate_mae.data import BadImage, Batch
from crate_mae.errors import RunStopped
from crate_mae.models.monotone import retract_
from crate_mae.options import origin
from crate_mae.training.checkpoint import Saver, TrainState, diverged
from crate_mae.training.failures import explain_end
from crate_mae.training.images import BadImages, micro_slices, training_batches
from crate_mae.training.model_state import ModelState, build_model_state, synchronizing, whole_tensor
from crate_mae.training.optimizer import warmup_cosine
from crate_mae.training.preflight import autocast, first_step, peak_on
from crate_mae.training.processes import Agreement, agree, first_decides, stop_requests
from crate_mae.training.progress import Display, describe_end, plan_lines
from crate_mae.training.randomness import seed_step
from crate_mae.training.report import Logbook, RunReport, open_trackers
from crate_mae.training.resume import resume
from crate_mae.training.task import Task

MOST_SKIPPED_IN_A_ROW = 5


def train(
    task: Task,
    accelerator: Accelerator,
    *,
    display: Display,
    plan: dict[str, str],
    newest: Path | None,
    started: float,
    data_changed: bool = False,
) -> None:
    """Train from the newest checkpoint, which has been checked, or from the beginning, to the end of the run.

    The plan is printed before the first step, and kept in the log and the report. `started` is the monotonic time at
    which this process began; `data_changed` allows other images than before.

    Raises:
        UserError: for a reason to stop that the user can fix. What was saved stays whole.
        RunStopped: after SIGINT, SIGTERM or SIGHUP, when everything has been saved.
    """
    directory = task.directory
    try:
        with ExitStack() as stack:
            first_decides(accelerator, lambda: stack.enter_context(directory.opened(task.config)))
            report = RunReport(task, plan, writes=accelerator.is_main_process)
            stack.enter_context(report.to_the_end())
            stack.enter_context(explain_end(accelerator, task.config))
            first_decides(accelerator, directory.log_start)
            display.lines(plan_lines(plan))

            # Build.
            model_state = build_model_state(task, accelerator)

            # Resume.
            state = resume(
                task, accelerator, model_state, newest=newest, report=display.warn, data_changed=data_changed
            )
            report.begin(state, started)
            stack.enter_context(open_trackers(accelerator, task.config, directory.path, state.step))

            # Closed with the run, so that no loader process outlives it, whatever ends it.
            batches = stack.enter_context(closing(_batches(task, accelerator, state.step)))
            _learn(task, accelerator, model_state, state, batches, display=display, report=report)
            report.end, use = describe_end(task, state, peak_on(accelerator.device), time.monotonic() - started)
            report.close()
            first_decides(accelerator, directory.finish)  # last of all: until then, the run is to be finished again
            display.lines([report.end, *use])
    except RunStopped:
        accelerator.wait_for_everyone()  # a launcher ends all processes at once when the first has ended
        raise


def _learn(
    task: Task,
    accelerator: Accelerator,
    model_state: ModelState,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    display: Display,
    report: RunReport,
) -> None:
    """From the state's step to the end of the run: step, log, save."""
    config, directory = task.config, task.directory
    bad_images = BadImages(directory.bad_files, config.max_bad, writes=accelerator.is_main_process)
    bad_images.add(0, task.bad_held_out)
    log = Logbook(task, accelerator, report)
    saver = Saver(task, model_state, accelerator)

    announce = accelerator.is_main_process and not config.quiet
    with stop_requests(announce=announce) as request, display.training(state.step, config.steps):
        if state.step == 0:
            log.begin(model_state)
        begun_at = state.step
        while state.step < config.steps:
            # Step.
            due = saver.is_due_by_clock()
            with first_step(is_first=state.step == begun_at):
                step = training_step(task, accelerator, model_state, batches, state.step, stop=request.signal, save=due)
            agreed = step.agreed
            state.count(agreed.loss, agreed.is_finite)
            if agreed.is_finite:
                model_state.move_average(state.step)

            # Log.
            seen = task.images_seen(state.step)
            met = gather_object(step.bad_images) if agreed.bad_images else []
            too_many_bad = bad_images.add(state.step, met) and bad_images.too_many(seen)
            row: dict[str, float] = {"lr": step.lr, "grad_norm": agreed.grad_norm}
            row |= {"skipped_steps": state.skipped, "bad_images": len(bad_images)}
            is_best = log.record(model_state, state, row, waited=step.waited)
            display.step(state.step, agreed.loss, log.images_per_second, log.data_wait)

            # Save.
            if agreed.save or agreed.stop or too_many_bad or is_best or saver.is_due_by_epoch(state):
                state.seconds = report.seconds()
                saver.save(state)
            if too_many_bad:
                limit, check = origin(config, "max_bad"), task.images.train.check_command
                raise bad_images.error(seen, config.resume_with_other_data, check=check, origin=limit)
            if (skipped := state.skipped_in_a_row) >= min(MOST_SKIPPED_IN_A_ROW, config.steps):
                what = f"Loss or gradients were not finite {skipped} steps in a row, up to step {state.step}."
                raise diverged(directory.path, what)
            if agreed.stop and state.step < config.steps:
                display.lines([f"Stopped and saved at step {state.step}. To continue: {config.resume_command}"])
                raise RunStopped(agreed.stop)
        saver.save_model(state)


class StepResult(NamedTuple):
    """What a process knows after a step; the unreadable images and the seconds of waiting for images are its own."""

    agreed: Agreement
    lr: float
    bad_images: list[BadImage]
    waited: float


def training_step(
    task: Task,
    accelerator: Accelerator,
    model_state: ModelState,
    batches: Iterator[Batch],
    step: int,
    *,
    stop: int,
    save: bool,
) -> StepResult:
    """Take one optimizer step, if loss and gradients are finite on all processes.

    It is a function of (weights, optimizer state, seed, step), and of nothing else; `step` is the number of steps
    before this one. For the agreement of all processes, each gives the signal that it received, or 0 (`stop`), and
    whether it finds a checkpoint due (`save`).
    """
    optimizer = model_state.optimizer
    lr = _set_learning_rate(task, optimizer, step)
    loss, bad_images, waited = _compute_gradients(task, accelerator, model_state, batches, step)
    norm = _clip_gradients(model_state.model.parameters(), task.config.clip_grad)
    agreed = agree(accelerator, loss=loss, grad_norm=norm, bad_images=len(bad_images), stop=stop, save=save)
    if agreed.is_finite:
        optimizer.step()
        retract_(model_state.plain)
    optimizer.zero_grad()
    return StepResult(agreed, lr, bad_images, waited)


def _set_learning_rate(task: Task, optimizer: Optimizer, step: int) -> float:
    """Set the learning rate of a step, which every group gets times its own `lr_scale`, and return it."""
    lr = warmup_cosine(step, task.config.steps, task.warmup_steps, *task.learning_rates)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _compute_gradients(
    task: Task, accelerator: Accelerator, model_state: ModelState, batches: Iterator[Batch], step: int
) -> tuple[Float[Tensor, ""], list[BadImage], float]:
    """Process the step's images: this process's loss, its unreadable images, and its seconds of waiting."""
    config, device, model = task.config, accelerator.device, model_state.model
    rank, world_size = accelerator.process_index, accelerator.num_processes
    seed_step(config.seed, step, rank)
    step_loss = task.step_loss(step)
    loss = torch.zeros((), device=device)
    bad_images: list[BadImage] = []
    waited = 0.0
    parts = micro_slices(config.batch_size, rank, world_size, config.accumulation)
    for number, part in enumerate(parts, start=1):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        bad_images += batch.bad
        with synchronizing(accelerator, model, last=number == len(parts)):
            with autocast(device, config.precision):
                part_loss = step_loss(model, batch.images, batch.labels, part) / len(parts)
            accelerator.backward(part_loss)
        loss += part_loss.detach()
    return loss, bad_images, waited


def _clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale gradients down to a norm of at most `max_norm`, unless that is 0; return their norm before."""
    parameters = list(parameters)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return whole_tensor(norm)


def _batches(task: Task, accelerator: Accelerator, start_step: int) -> Generator[Batch]:
    return training_batches(
        task.images.train,
        task.transform(),
        task.config,
        start_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
