"""What all commands that train do with their options: limits, length, machine, and all mistakes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch

from crate_mae.data.dataset import default_workers
from crate_mae.errors import UserError
from crate_mae.models.classifier import HeadPooling
from crate_mae.training.processes import processes_here
from crate_mae.training.trackers import choose_trackers

_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda x: x > 0, "more than 0")
_AT_LEAST_0: tuple[Callable[[Any], bool], str] = (lambda x: x >= 0, "at least 0")
_AT_LEAST_1: tuple[Callable[[Any], bool], str] = (lambda x: x >= 1, "at least 1")
_BELOW_1: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x < 1, "at least 0 and less than 1")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda x: 0 < x <= 1, "more than 0 and at most 1")
_LIMITS = {
    "epochs": _AT_LEAST_1,
    "steps": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "lr": _POSITIVE,
    "min_lr": _AT_LEAST_0,
    "warmup_epochs": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "clip_grad": _AT_LEAST_0,
    "mask_ratio": (lambda x: 0 < x < 1, "between 0 and 1"),
    "min_crop": _SHARE,
    "channels": _AT_LEAST_1,
    "seed": _AT_LEAST_0,
    "labels": _SHARE,
    "layer_decay": _SHARE,
    "mixup": _AT_LEAST_0,
    "cutmix": _AT_LEAST_0,
    "label_smoothing": _BELOW_1,
    "ema": _BELOW_1,
    "accumulation": _AT_LEAST_1,
    "workers": _AT_LEAST_0,
    "threads": _AT_LEAST_1,
    "max_bad": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "checkpoint_minutes": _POSITIVE,
    "checkpoint_epochs": _AT_LEAST_1,
    "log_steps": _AT_LEAST_1,
    "monitor_steps": _AT_LEAST_1,
}
_WHOLE = (
    *("epochs", "steps", "batch_size", "channels", "seed", "accumulation", "workers", "threads"),
    *("checkpoint_epochs", "log_steps", "monitor_steps"),
)
_CHOICES = {
    "precision": ("auto", "float32", "bfloat16"),
    "mask_tokens": (None, "encoder", "decoder"),
    "pooling": get_args(HeadPooling),
}


class Mistakes(list[str]):
    """Messages of the mistakes found so far."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Note a `UserError` of the block instead of raising it."""
        try:
            yield
        except UserError as error:
            self.append(str(error))

    def raise_if_any(self) -> None:
        """Raise one `UserError` with all messages."""
        if self:
            raise UserError("\n".join(dict.fromkeys(self)))


def begin(given: dict[str, Any]) -> Mistakes:
    """Check each option by itself, and choose the trackers; the mistakes so far."""
    mistakes = Mistakes(_out_of_limits(given))
    with mistakes.collected():
        given["trackers"] = choose_trackers(given["trackers"])
    return mistakes


def option_name(key: str) -> str:
    """How the command line calls an option."""
    return f"--{key.replace('_', '-')}"


def default_batch_size(images: int, share: int) -> int:
    """The largest power of two that is at most 256 and an eighth of the images, so that an epoch has 8 steps or more.

    Args:
        images: training images.
        share: processes times accumulated micro-batches, among which a batch must divide evenly.
    """
    batch = 2 ** int(math.log2(max(1, min(256, images // 8))))
    return max(1, batch // share) * share


def resolve_length(
    given: dict[str, Any],
    images: int,
    processes: int,
    mistakes: Mistakes,
    *,
    epochs: int,
    warmup: float,
    inseparable: int = 1,
) -> None:
    """Fill in batch size, number of steps and warm-up.

    Args:
        given: the options.
        images: training images.
        processes: training processes.
        mistakes: to add to; with any, nothing more is filled in.
        epochs: length by default.
        warmup: share of the run that warms up by default.
        inseparable: neighbours of a batch that must be in one micro-batch.
    """
    if any(option_name(key) in mistake for mistake in mistakes for key in ("batch_size", "accumulation")):
        return
    share = given["accumulation"] * processes * inseparable
    if given["batch_size"] is None:
        given["batch_size"] = default_batch_size(images, share)
    batch = given["batch_size"]
    if share > images:
        mistakes.append(
            f"Each of {processes} process(es) needs an image for each of {given['accumulation']} accumulated "
            f"micro-batches, {share} in all, but there are {images} to train on: take fewer processes or a smaller "
            "--accumulation."
        )
    elif batch > images:
        most = images // share * share
        mistakes.append(
            f"A batch of {batch} is larger than the {images} training images: the most is --batch-size {most}."
        )
    elif batch % share:
        nearest = max(share, round(batch / share) * share)
        pairs = " in pairs, which --mixup and --cutmix (or 0 for both) need" if inseparable > 1 else ""
        mistakes.append(
            f"A batch of {batch} cannot be divided among {processes} process(es) x {given['accumulation']} accumulated "
            f"micro-batches{pairs}: take --batch-size {nearest}."
        )
    if mistakes:
        return
    steps_per_epoch = images // batch
    if given["steps"] is None:
        given["steps"] = steps_per_epoch * (given["epochs"] or epochs)
    steps = given["steps"]
    if given["warmup_epochs"] is None:
        given["warmup_epochs"] = round(warmup * steps / steps_per_epoch, 4)
    if round(given["warmup_epochs"] * steps_per_epoch) >= steps:
        mistakes.append(
            f"--warmup-epochs {given['warmup_epochs']:g} is as long as the whole run of {steps / steps_per_epoch:g} "
            "epochs: make it shorter."
        )
    given["log_steps"] = given["log_steps"] or max(1, min(50, steps // 200))


def resolve_machine(given: dict[str, Any], processes: int) -> None:
    """Fill in how many processes load images and how many threads compute."""
    if given["workers"] is None:
        given["workers"] = default_workers(processes_here(processes))
    given["threads"] = given["threads"] or torch.get_num_threads()
    given["checkpoint_epochs"] = given["checkpoint_epochs"] or 0


def _out_of_limits(given: dict[str, Any]) -> Iterator[str]:
    for key, (is_right, limits) in _LIMITS.items():
        value = given.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{option_name(key)} is {value!r}, but must be a number."
        elif not is_right(value):
            yield f"{option_name(key)} is {value}, but must be {limits}."
        elif key in _WHOLE and not isinstance(value, int):
            yield f"{option_name(key)} is {value}, but must be a whole number."
    for key, choices in _CHOICES.items():
        if key in given and given[key] not in choices:
            yield f"{option_name(key)} is {given[key]}, but must be one of {', '.join(map(str, choices))}."
    if given["epochs"] is not None and given["steps"] is not None:
        yield "--epochs and --steps both say how long to train: give one of them."
