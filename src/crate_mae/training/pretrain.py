"""The pretraining loop, to be read from top to bottom: build, resume, step, log, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from crate_mae.data import BadImage, Batch
from crate_mae.errors import RunStopped, UserError
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.training import checkpoint
from crate_mae.training.bad_images import BadImages
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.config import PretrainConfig
from crate_mae.training.files import is_disk_full
from crate_mae.training.images import RunImages, training_batches
from crate_mae.training.logbook import Logbook, start_trackers
from crate_mae.training.monitor import Monitor
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.precision import autocast
from crate_mae.training.processes import Agreement, agree, first_decides, stop_requests
from crate_mae.training.progress import Display
from crate_mae.training.randomness import seed_step, step_mask
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.sampler import micro_slices
from crate_mae.training.saver import Saver
from crate_mae.training.schedule import scaled_lr, warmup_cosine

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of, checked, before anything is written."""

    config: PretrainConfig
    images: RunImages
    model: MaskedAutoencoder
    accelerator: Accelerator
    held_out: Float[Tensor, "b c hh ww"]
    bad_held_out: list[BadImage]

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the training images."""
        return len(self.images.train) // self.config.batch_size

    def images_seen(self, steps: int) -> int:
        """Distinct images asked for in the first `steps` steps, the held-out ones included."""
        train = len(self.images.train)
        return len(self.images.held_out) + min(train, steps * self.config.batch_size)


def train(setup: Setup, directory: RunDirectory, display: Display, plan: Sequence[str] = ()) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end of the run.

    Args:
        setup: what to train on what.
        directory: where everything is kept.
        display: shows the plan and the progress.
        plan: lines to show before the first step, and to keep in the log.

    Raises:
        UserError: for a reason to stop that the user can mend. What was saved stays whole.
        RunStopped: after SIGINT or SIGTERM, when everything has been saved.
    """
    config, accelerator = setup.config, setup.accelerator
    with ExitStack() as stack:
        first_decides(accelerator, lambda: stack.enter_context(directory.opened(config)))
        stack.enter_context(_full_disk_explained(directory))
        display.lines(plan)

        # Build.
        if config.compile:
            setup.model.compile()
        model, optimizer = accelerator.prepare(setup.model, build_optimizer(setup.model, config.weight_decay))
        plain = accelerator.unwrap_model(model)

        # Resume.
        state = _resume(setup, directory, model, optimizer.optimizer)
        bad_images = BadImages(directory.bad_files, config.max_bad, writes=accelerator.is_main_process)
        log, saver = _build_log_and_saver(setup, directory, model, optimizer.optimizer, bad_images)
        start_trackers(accelerator, config, directory.path, state.step)
        stack.callback(_close_trackers, accelerator)
        # Closed with the run, so that no loader process outlives it, whatever ends it.
        batches = stack.enter_context(closing(_batches(setup, state.step)))

        request = stack.enter_context(stop_requests())
        stack.enter_context(display.training(state.step, config.steps))
        if state.step == 0:
            log.begin(plain)
        while state.step < config.steps:
            # Step.
            step = training_step(setup, model, optimizer, batches, state.step, request.signal, saver.is_due_by_clock())
            state.count(step.loss, step.is_finite)

            # Log.
            too_many_bad = step.agreed.bad_images and _note_bad_images(setup, bad_images, state.step, step.bad_images)
            log.record(
                plain, state, waited=step.waited, lr=step.lr, grad_norm=step.grad_norm, bad_images=len(bad_images)
            )
            display.step(state.step, step.loss, log.images_per_second, log.data_wait)

            # Save.
            if step.agreed.save or step.agreed.stop or too_many_bad or saver.is_due_by_epoch(state):
                saver.save(state, plain.config)
            if too_many_bad:
                raise bad_images.error(setup.images_seen(state.step))
            if state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise _diverged(directory, state)
            if step.agreed.stop and state.step < config.steps:
                display.lines([f"Stopped and saved at step {state.step}. To go on: {directory.resume_command}"])
                raise RunStopped(step.agreed.stop)

        saver.save_model(plain.config)


class StepResult(NamedTuple):
    """One step, as seen by one process.

    Attributes:
        loss: of the global batch.
        grad_norm: of all gradients, before clipping.
        lr: learning rate.
        is_finite: whether loss and gradients were finite; if not, the weights have not been changed.
        bad_images: unreadable images that this process met.
        waited: seconds spent waiting for images.
        agreed: what all processes know together.
    """

    loss: float
    grad_norm: float
    lr: float
    is_finite: bool
    bad_images: list[BadImage]
    waited: float
    agreed: Agreement


def training_step(
    setup: Setup,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    step: int,
    stop: int,
    save: bool,
) -> StepResult:
    """One optimizer step: a function of (weights, optimizer state, seed, step), and of nothing else.

    Args:
        setup: of the run.
        model: as the accelerator prepared it, like the optimizer.
        optimizer: steps only if loss and gradients are finite on all processes.
        batches: micro-batches of this process.
        step: number of steps before this one.
        stop: signal that this process was sent, or 0.
        save: whether this process finds a checkpoint due.
    """
    config, accelerator = setup.config, setup.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    peak_lr, final_lr = scaled_lr(config.lr, config.batch_size), scaled_lr(config.min_lr, config.batch_size)
    warmup_steps = round(config.warmup_epochs * setup.steps_per_epoch)
    lr = warmup_cosine(step, config.steps, warmup_steps, peak_lr, final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    seed_step(config.seed, step, rank)
    masks = step_mask(config.seed, step, config.batch_size, setup.model.num_patches, config.mask_ratio)

    loss = torch.zeros((), device=accelerator.device)
    bad_images: list[BadImage] = []
    waited = 0.0
    parts = micro_slices(config.batch_size, rank, world_size, config.accumulation)
    for number, part in enumerate(parts, start=1):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        bad_images += batch.bad
        images = batch.images.to(accelerator.device, non_blocking=True)
        # Gradients travel between processes once per step, with the last micro-batch.
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            with autocast(accelerator.device, config.precision):
                part_loss = model(images, mask=masks[part]).loss / len(parts)
            accelerator.backward(part_loss)
        loss += part_loss.detach()

    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
    grad_norm = float(cast(torch.Tensor, norm))
    agreed = agree(accelerator, loss=loss, bad_images=len(bad_images), stop=stop, save=save)
    is_finite = math.isfinite(agreed.loss) and math.isfinite(grad_norm)
    if is_finite:
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(agreed.loss, grad_norm, lr, is_finite, bad_images, waited, agreed)


def _resume(setup: Setup, directory: RunDirectory, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """The state to go on from; logs are cut back to it."""
    images, world_size = len(setup.images.train), setup.accelerator.num_processes
    folder = checkpoint.newest_checkpoint(directory.path)
    if folder is None:
        state = TrainState(images=images)
    else:
        state = checkpoint.read(folder, model, optimizer)
        if state.images != images:
            raise UserError(
                f"This run trains on {state.images} images, but its data now has {images}.\n"
                "Put the data back as it was, or start a new run with another --out."
            )
        logger.info("Resuming from %s, which %d process(es) wrote.", folder, state.world_size)
    state.world_size = world_size
    if setup.accelerator.is_main_process:
        directory.cut_back(None if folder is None else state.step)
    setup.accelerator.wait_for_everyone()
    return state


def _batches(setup: Setup, start_step: int) -> Generator[Batch]:
    accelerator = setup.accelerator
    return training_batches(
        setup.images.train,
        setup.config,
        start_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def _build_log_and_saver(
    setup: Setup, directory: RunDirectory, model: nn.Module, optimizer: Optimizer, bad_images: BadImages
) -> tuple[Logbook, Saver]:
    config, accelerator, steps_per_epoch = setup.config, setup.accelerator, setup.steps_per_epoch
    bad_images.add(0, setup.bad_held_out)
    monitor = Monitor(setup.held_out, setup.model.num_patches, config.mask_ratio)
    log = Logbook(directory, config, monitor=monitor, accelerator=accelerator, steps_per_epoch=steps_per_epoch)
    saver = Saver(
        directory, config, model=model, optimizer=optimizer, accelerator=accelerator, steps_per_epoch=steps_per_epoch
    )
    return log, saver


def _note_bad_images(setup: Setup, bad_images: BadImages, step: int, found: list[BadImage]) -> bool:
    """Write down what all processes found; whether new ones make too many."""
    return bad_images.add(step, gather_object(found)) and bad_images.too_many(setup.images_seen(step))


def _diverged(directory: RunDirectory, state: TrainState) -> UserError:
    last = checkpoint.newest_checkpoint(directory.path)
    return UserError(
        f"Loss or gradients were not finite {state.skipped_in_a_row} steps in a row, up to step {state.step}.\n"
        f"The last good checkpoint is {last or 'none: the run had only begun'}.\n"
        "Start a new run with a lower --lr, a longer --warmup-epochs, or --precision float32."
    )


def _close_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()


@contextmanager
def _full_disk_explained(directory: RunDirectory) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        last = checkpoint.newest_checkpoint(directory.path)
        raise UserError(
            f"The disk of {directory.path} is full, so the run has stopped. "
            + (f"Its last checkpoint, {last.name}, is whole." if last else "It had no checkpoint yet.")
            + f"\nFree some space, then: {directory.resume_command}"
        ) from error
