"""The learning rate at every step, as pure functions."""

from __future__ import annotations

import math


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """The linear scaling rule lr = base_lr * global_batch / 256 (Goyal et al. 2017, "Accurate, Large Minibatch SGD").

    Args:
        base_lr: learning rate for 256 images per step.
        global_batch: images per step over all processes and accumulated micro-batches.
    """
    return base_lr * global_batch / 256


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak_lr: float, final_lr: float) -> float:
    """Linear warm-up to `peak_lr`, then half a cosine down to `final_lr`.

    - step < warmup_steps: peak_lr (step + 1) / warmup_steps, so that not even the first step is wasted on lr = 0;
    - after that: final_lr + (peak_lr - final_lr) (1 + cos(pi t)) / 2, with t = (step - warmup) / (total - warmup).

    Args:
        step: steps done so far, from 0 to total_steps - 1; `final_lr` would be reached at total_steps.
        total_steps: steps of the whole run.
        warmup_steps: steps of the warm-up, less than total_steps.
        peak_lr: learning rate at the end of the warm-up.
        final_lr: learning rate at the end of the run.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (peak_lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
