"""AdamW, which parameters its weight decay leaves alone, and the learning rate at every step."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import param_groups_weight_decay
from torch.optim import AdamW

from crate_mae.models.autoencoder import MaskedAutoencoder

BETAS = (0.9, 0.95)  # those of MAE and of the CRATE-MAE paper: with 0.999, masked training spikes


def build_optimizer(model: MaskedAutoencoder, weight_decay: float) -> AdamW:
    """AdamW for masked training.

    Decay pulls a matrix towards zero. A bias, a norm's scale, a class token or a mask token has no reason to be near
    zero: parameters of at most one dimension and those of `no_weight_decay` are left alone.
    """
    return adamw(param_groups_weight_decay(model, weight_decay, no_weight_decay_list=model.no_weight_decay()), BETAS)


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> AdamW:
    """AdamW, on CUDA and CPUs in one kernel. The loop sets the learning rate before every step."""
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")  # on CPUs 4 times as fast as PyTorch's default
    return AdamW(groups, lr=0.0, betas=betas, fused=fused or None)


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """The linear scaling rule lr = base_lr * global_batch / 256 (Goyal et al. 2017, "Accurate, Large Minibatch SGD").

    The global batch counts the images of all processes and accumulated micro-batches.
    """
    return base_lr * global_batch / 256


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak_lr: float, final_lr: float) -> float:
    """Linear warm-up to `peak_lr`, then half a cosine down to `final_lr`.

    - step < warmup_steps: peak_lr (step + 1) / warmup_steps, so that not even the first step is wasted on lr = 0;
    - after that: final_lr + (peak_lr - final_lr) (1 + cos(pi t)) / 2, with t = (step - warmup) / (total - warmup).

    `step` counts the steps done so far, from 0 to total_steps - 1; `final_lr` would be reached at total_steps.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (peak_lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
