"""What a run trains: the model, whole or sharded among processes, its optimizer, and a running average of the weights.

Sharding is FSDP2: each process keeps, and steps, its share of every tensor. `accelerate launch` asks for it as usual,
with `distributed_type: FSDP` and `fsdp_version: 2`. Accelerate reads these settings, and PyTorch's `fully_shard` does
the work, because Accelerate itself does not shard on a CPU: so the tests, which compare with the weights of one
process, run the same code as GPUs. Each layer of encoder and decoder is sharded by itself, then the rest of the model.
A layer is whole only while it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from crate_mae.errors import UserError
from crate_mae.models.monotone import retract_
from crate_mae.training.task import Task

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the first process; the others get nothing
_POWER = 0.75  # timm's for all but the longest runs: the decay is 1 - steps^-0.75 until it reaches its final value


@dataclass(frozen=True)
class ModelState:
    """A model in training.

    Attributes:
        model: as the accelerator prepared it, or sharded.
        plain: the model itself.
        optimizer: of the plain model's parameters.
        average: of the plain model's weights over the last steps; None if none is kept.
        whole: where the model is sharded, another one on the CPU of the first process, to put whole weights into.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: Optimizer
    average: ModelEmaV3 | None = None
    whole: nn.Module | None = None

    @property
    def kept(self) -> nn.Module:
        """The model that is measured and kept: the average if there is one, else the plain model; perhaps sharded."""
        return self.plain if self.average is None else self.average.module

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return isinstance(self.model, FSDPModule)

    @contextmanager
    def measured(self, accelerator: Accelerator) -> Iterator[nn.Module]:
        """The kept model, whole and on its device in the first process. All processes must call this together."""
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
        """Update the average after the given number of steps."""
        if self.average is not None:
            self.average.update(self.plain, step=step)


def build_model_state(task: Task, accelerator: Accelerator) -> ModelState:
    """Prepare the task's model for training: sharded if the launcher asks for it, else one whole model per process."""
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
        if config.compile:  # layer by layer, so that no compiled region contains gathering and sharding
            for layer in plain.layers:
                layer.compile(fullgraph=True)
        for each in (plain, *([] if average is None else [average.module])):
            shard(each, accelerator, settings)
        model = plain
    retract_(plain)
    return ModelState(model, plain, task.optimizer(plain), average, whole)


def average_of(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """A running average that begins at the model's weights, or None for a decay of 0.

    At first it forgets faster than with `decay`, so that the average of a short run is not that of the initialisation.
    """
    if not decay:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=_POWER, exclude_buffers=True)


def asked_sharding() -> FullyShardedDataParallelPlugin | None:
    """The settings with which the launcher asks for sharding; None if it does not.

    Raises:
        UserError: if it asks for another kind than FSDP2, or for something that is an option of ours or not supported.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if parse_flag_from_env(name):
            raise UserError(
                f"Training runs whole models (DDP) or sharded ones (FSDP2), but the launcher has set {name}.\n"
                "Launch it with torchrun, or with `accelerate launch` and distributed_type MULTI_GPU or FSDP."
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    asked = FullyShardedDataParallelPlugin()
    if asked.fsdp_version != 2:
        raise UserError(
            "The launcher asks for the first version of FSDP, but models are sharded with the second.\n"
            "Put `fsdp_version: 2` into the fsdp_config of its configuration."
        )
    if asked.activation_checkpointing:
        raise UserError("Give --grad-checkpointing instead of fsdp_activation_checkpointing in the launcher's file.")
    if isinstance(asked.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "Sharded weights stay on the GPU here: put `fsdp_offload_params: false` into the launcher's file."
        )
    return asked


def sharding_of(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The settings with which models are sharded; None if they stay whole, as always with one process."""
    return asked_sharding() if accelerator.num_processes > 1 else None


def shard(model: Any, accelerator: Accelerator, settings: FullyShardedDataParallelPlugin) -> None:
    """Shard a model with `layers` among all processes, in place: its tensors become `DTensor`s."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=bool(settings.reshard_after_forward))
    fully_shard(model, mesh=mesh)


@contextmanager
def synchronizing(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Reduce gradients over processes in the block's backward pass only if it is of the `last` micro-batch."""
    is_sharded = isinstance(model, FSDPModule)
    if is_sharded:
        model.set_requires_gradient_sync(last)
    with nullcontext() if last or is_sharded else accelerator.no_sync(model):
        yield


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All tensors of a model on the CPU of the first process; nothing in the others. All must call this together."""
    return get_model_state_dict(model, options=WHOLE)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, example: Tensor | None) -> Tensor:
    """This process's shard of a tensor that every process has whole; the whole if the example is not sharded alike."""
    if not isinstance(example, DTensor) or example.shape != whole.shape:
        return whole
    # Without a source rank nothing is sent: each process takes its part of its own copy.
    device = torch.device(example.device_mesh.device_type)
    return distribute_tensor(whole.to(device), example.device_mesh, example.placements, src_data_rank=None)
