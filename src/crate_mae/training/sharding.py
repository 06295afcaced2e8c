"""Models cut among processes (FSDP2): each process keeps, and steps, its share of every tensor.

`accelerate launch` asks for it in the usual way, with `distributed_type: FSDP` and `fsdp_version: 2`. Accelerate reads
these settings, and PyTorch's `fully_shard` does the work, because Accelerate itself shards on no CPU: so what the tests
hold to the weights of one process is the same code that runs on GPUs.

Cut are the layers of encoder and decoder, each by itself, and then whatever the model has besides. A layer is whole
only while it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from crate_mae.errors import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the first process; the others get nothing


def asked_sharding() -> FullyShardedDataParallelPlugin | None:
    """The settings with which the launcher asks for sharding; None if it does not.

    Raises:
        UserError: if it asks for another kind than FSDP2, or for what is an option of ours or not supported.
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
        raise UserError("Say --grad-checkpointing instead of fsdp_activation_checkpointing in the launcher's file.")
    if isinstance(asked.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "Sharded weights stay on the GPU here: put `fsdp_offload_params: false` into the launcher's file."
        )
    return asked


def sharding_of(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The settings with which the models of these processes are cut; None if they stay whole, as one process's does."""
    return asked_sharding() if accelerator.num_processes > 1 else None


def shard(model: Any, accelerator: Accelerator, settings: FullyShardedDataParallelPlugin) -> None:
    """Cut a model among all processes, in place. Its tensors become `DTensor`s; it is called as before.

    Args:
        model: with `layers`; the same in all processes.
        accelerator: of the processes.
        settings: of the launcher.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=bool(settings.reshard_after_forward))
    fully_shard(model, mesh=mesh)


@contextmanager
def synchronizing(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Whether the block's backward pass brings gradients together: of a step's micro-batches, only the last does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All tensors of a model on the CPU of the first process; nothing in the others. All must call this together."""
    return get_model_state_dict(model, options=WHOLE)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the parts that are elsewhere. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(whole: Tensor, example: Tensor | None) -> Tensor:
    """This process's part of a tensor that every process has whole; without an equally large example, the whole."""
    if not isinstance(example, DTensor) or example.shape != whole.shape:
        return whole
    # Without a source rank nothing is sent: each process cuts its part out of its own copy.
    device = torch.device(example.device_mesh.device_type)
    return distribute_tensor(whole.to(device), example.device_mesh, example.placements, src_data_rank=None)
