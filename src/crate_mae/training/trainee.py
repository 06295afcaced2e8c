"""What a run trains: the model, its optimizer, and a running average of the weights where one is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from crate_mae.models.monotone import retract_
from crate_mae.training.sharding import shard, sharding_of, whole_weights
from crate_mae.training.task import Task

_POWER = 0.75  # timm's for all but the longest runs: the decay is 1 - steps^-0.75 until it reaches its final value


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Attributes:
        model: as the accelerator prepared it, or sharded.
        plain: the model itself.
        optimizer: torch's own, which is saved.
        accelerated: the accelerator's wrapper of it, which steps.
        average: of the plain model's weights over the last steps; None if none is kept.
        whole: where the model is sharded, another one on the CPU of the first process, to put whole weights into.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: Optimizer
    accelerated: Optimizer
    average: ModelEmaV3 | None = None
    whole: nn.Module | None = None

    @property
    def kept(self) -> nn.Module:
        """What is measured and kept in the end: the average if there is one, else the plain model; perhaps sharded."""
        return self.plain if self.average is None else self.average.module

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return isinstance(self.model, FSDPModule)

    @contextmanager
    def measured(self, accelerator: Accelerator) -> Iterator[nn.Module]:
        """What is kept, whole and on its device in the first process. All processes must call this together."""
        if not self.is_sharded:
            yield self.kept
            return
        weights = whole_weights(self.kept)
        if self.whole is None:
            yield self.kept  # not the first process, which alone measures
            return
        self.whole.load_state_dict(weights)
        try:
            yield self.whole.to(accelerator.device)
        finally:
            self.whole.to("cpu")

    def move_average(self, step: int) -> None:
        """Let the average follow, after the given number of steps."""
        if self.average is not None:
            self.average.update(self.plain, step=step)


def build_trainee(task: Task, accelerator: Accelerator) -> Trainee:
    """The task's model as it is to be trained: sharded if the launcher says so, else one whole model per process."""
    config, plain = task.config, task.model
    if config.grad_checkpointing:
        plain.set_grad_checkpointing()
    settings = sharding_of(accelerator)
    average, whole = None, None
    if settings is None:
        if config.compile:
            plain.compile(fullgraph=True)
        model = accelerator.prepare_model(plain)
        average = average_of(plain, task.ema)
    else:
        average = average_of(plain, task.ema)
        whole = copy.deepcopy(plain) if accelerator.is_main_process else None
        if config.compile:  # layer by layer, between the moments when a layer is gathered and cut again
            for layer in plain.layers:
                layer.compile(fullgraph=True)
        for each in (plain, *([] if average is None else [average.module])):
            shard(each, accelerator, settings)
        model = plain
    retract_(plain)
    optimizer = task.optimizer(plain)
    accelerated = accelerator.prepare_optimizer(optimizer)
    return Trainee(model, plain, optimizer, accelerated=accelerated, average=average, whole=whole)


def average_of(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """An average that begins at the model as it is, or none for a decay of 0.

    At first it forgets faster than `decay` says, so that the average of a short run is not that of untrained weights.
    """
    if not decay:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=_POWER, exclude_buffers=True)
