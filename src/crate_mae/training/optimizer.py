"""AdamW, and which parameters its weight decay leaves alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

from crate_mae.models.autoencoder import MaskedAutoencoder

BETAS = (0.9, 0.95)  # those of MAE and of the CRATE-MAE paper: with 0.999, masked training spikes


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Split parameters into a group with weight decay and one without.

    Decay pulls a matrix towards zero. A bias, a norm's scale, a class token or a mask token has no reason to be near
    zero: parameters of at most one dimension and those named in `no_decay` are left alone.

    Args:
        named_parameters: as `nn.Module.named_parameters` gives them. Frozen ones are left out.
        weight_decay: of the first group.
        no_decay: full names of further parameters without decay.

    Returns:
        Parameter groups for a torch optimizer: first decayed, then not decayed. Empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 or name in no_decay else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: MaskedAutoencoder, weight_decay: float) -> AdamW:
    """AdamW over `decay_groups` of the model, as masked training wants it."""
    return adamw(decay_groups(model.named_parameters(), weight_decay, model.no_weight_decay()), BETAS)


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> AdamW:
    """AdamW, on CUDA and CPUs in one kernel. The loop sets the learning rate before every step."""
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")  # on CPUs 4 times as fast as PyTorch's default
    return AdamW(groups, lr=0.0, betas=betas, fused=fused or None)
