"""One optimizer step, for any task, number of processes and micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from crate_mae.data import BadImage, Batch
from crate_mae.models.devices import send
from crate_mae.models.monotone import retract_
from crate_mae.training.logbook import StepLog
from crate_mae.training.precision import autocast
from crate_mae.training.processes import Agreement, agree
from crate_mae.training.randomness import seed_step
from crate_mae.training.sampler import micro_slices
from crate_mae.training.schedule import scaled_lr, warmup_cosine
from crate_mae.training.sharding import synchronizing, whole_tensor
from crate_mae.training.task import Task
from crate_mae.training.trainee import Trainee


class StepResult(NamedTuple):
    """One step, as seen by one process.

    Attributes:
        loss: of the global batch.
        is_finite: whether loss and gradients were finite; if not, the weights have not been changed.
        bad_images: unreadable images that this process met.
        log: what the logbook writes down.
        agreed: what all processes know together.
    """

    loss: float
    is_finite: bool
    bad_images: list[BadImage]
    log: StepLog
    agreed: Agreement


def training_step(
    task: Task,
    accelerator: Accelerator,
    trainee: Trainee,
    batches: Iterator[Batch],
    step: int,
    *,
    stop: int,
    save: bool,
) -> StepResult:
    """One optimizer step: a function of (weights, optimizer state, seed, step), and of nothing else.

    Args:
        task: of the run.
        accelerator: brings devices and processes together.
        trainee: its optimizer steps only if loss and gradients are finite on all processes.
        batches: micro-batches of this process.
        step: number of steps before this one.
        stop: signal that this process was sent, or 0.
        save: whether this process finds a checkpoint due.
    """
    optimizer = trainee.accelerated
    lr = _set_learning_rate(task, optimizer, step)
    loss, bad_images, waited = _gradients(task, accelerator, trainee, batches, step)
    norm = _clipped_norm(trainee.model.parameters(), task.config.clip_grad)
    agreed = agree(accelerator, loss=loss, grad_norm=norm, bad_images=len(bad_images), stop=stop, save=save)
    is_finite = math.isfinite(agreed.loss) and math.isfinite(agreed.grad_norm)
    if is_finite:
        optimizer.step()
        retract_(trainee.plain)
    optimizer.zero_grad()
    return StepResult(agreed.loss, is_finite, bad_images, StepLog(lr, agreed.grad_norm, waited), agreed)


def _clipped_norm(parameters: Iterable[Tensor], most: float) -> Float[Tensor, ""]:
    """The norm of all gradients, which are then scaled down to at most `most`; 0 leaves them as they are."""
    parameters = list(parameters)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if most:
        clip_grads_with_norm_(parameters, most, norm)
    return whole_tensor(norm)


def _gradients(
    task: Task, accelerator: Accelerator, trainee: Trainee, batches: Iterator[Batch], step: int
) -> tuple[Float[Tensor, ""], list[BadImage], float]:
    """Work through the step's images: this process's loss, its unreadable images, and its seconds of waiting."""
    config, device, model = task.config, accelerator.device, trainee.model
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
        images, labels = (send(x, device) for x in (batch.images, batch.labels))
        if device.type == "cuda":  # so that its convolution gives patches one after another, as tokens
            images = images.contiguous(memory_format=torch.channels_last)
        with synchronizing(accelerator, model, last=number == len(parts)):
            with autocast(device, config.precision):
                part_loss = step_loss(model, images, labels, part) / len(parts)
            accelerator.backward(part_loss)
        loss += part_loss.detach()
    return loss, bad_images, waited


def _set_learning_rate(task: Task, optimizer: Optimizer, step: int) -> float:
    """The learning rate of a step, which every group gets times its own `lr_scale`."""
    config = task.config
    peak_lr, final_lr = scaled_lr(config.lr, config.batch_size), scaled_lr(config.min_lr, config.batch_size)
    warmup_steps = round(config.warmup_epochs * task.steps_per_epoch)
    lr = warmup_cosine(step, config.steps, warmup_steps, peak_lr, final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
