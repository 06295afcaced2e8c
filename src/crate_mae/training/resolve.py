"""From the options a user gave to a full configuration: defaults from the data, and all mistakes at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from crate_mae.data import ImageSource, channel_statistics, describe_images, suggest_model
from crate_mae.errors import UserError
from crate_mae.models.config import ModelConfig
from crate_mae.models.presets import preset
from crate_mae.training.config import PretrainConfig
from crate_mae.training.images import RunImages, data_name, open_images
from crate_mae.training.logbook import choose_trackers

DEFAULT_EPOCHS = 100
WARMUP_SHARE = 0.05
_MODEL_OPTIONS = ("image_size", "in_chans", "mean", "std", "mask_tokens", "norm_pix_loss", "drop_path")

_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda x: x > 0, "more than 0")
_AT_LEAST_0: tuple[Callable[[Any], bool], str] = (lambda x: x >= 0, "at least 0")
_AT_LEAST_1: tuple[Callable[[Any], bool], str] = (lambda x: x >= 1, "at least 1")
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
    "min_crop": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    "channels": _AT_LEAST_1,
    "seed": _AT_LEAST_0,
    "accumulation": _AT_LEAST_1,
    "workers": _AT_LEAST_0,
    "threads": _AT_LEAST_1,
    "max_bad": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "checkpoint_minutes": _POSITIVE,
    "checkpoint_epochs": _AT_LEAST_1,
    "log_steps": _AT_LEAST_1,
    "monitor_steps": _AT_LEAST_1,
}
_CHOICES = {
    "precision": ("auto", "float32", "bfloat16"),
    "mask_tokens": (None, "encoder", "decoder"),
}


class _Mistakes(list[str]):
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


def resolve(data: Any, options: dict[str, Any], processes: int) -> tuple[PretrainConfig, RunImages, ModelConfig]:
    """Fill in every option that is None, from the data and the machine.

    Args:
        data: any form of DATA.
        options: all other options of `crate_mae.pretrain` by name.
        processes: number of training processes.

    Returns:
        The configuration, in which only `precision` may still be "auto" and `checkpoint_epochs` 0, which the probe
        decides; the images; and the model's configuration.

    Raises:
        UserError: with all mistakes.
    """
    given = dict(options)
    val = given["val"]
    mistakes = _Mistakes(_out_of_limits(given))
    images = model = None
    with mistakes.collected():
        data, val = (data_name(item) if isinstance(item, (str, Path)) else item for item in (data, val))
        images = open_images(data, val)
        _resolve_length(given, len(images.train), processes, mistakes)
    with mistakes.collected():
        given["trackers"] = choose_trackers(given["trackers"])
    with mistakes.collected():
        model = _resolve_model(given, images.train if images and not mistakes else None)
    mistakes.raise_if_any()
    assert images is not None and model is not None

    _resolve_machine(given, processes)
    given |= {
        "data": data_name(data),
        "val": None if val is None else data_name(val),
        "model": model.name,
        "model_settings": dict(given["model_settings"] or {}),
        "image_size": model.image_size,
        "channels": model.in_chans,
        "mean": model.mean,
        "std": model.std,
        "mask_tokens": model.mask_tokens,
        "norm_pix_loss": model.norm_pix_loss,
        "drop_path": model.drop_path,
    }
    if given["lr"] is None:
        given["lr"] = default_base_lr(model.embed_dim, given["batch_size"])
    del given["epochs"]
    return PretrainConfig(**given), images, model


def default_batch_size(images: int, share: int) -> int:
    """The largest power of two that is at most 256 and an eighth of the images, so that an epoch has 8 steps or more.

    Args:
        images: training images.
        share: processes times accumulated micro-batches, among which a batch must divide evenly.
    """
    batch = 2 ** int(math.log2(max(1, min(256, images // 8))))
    return max(1, batch // share) * share


def default_base_lr(embed_dim: int, batch_size: int) -> float:
    """Learning rate per 256 images, 1.5e-4 (768 / d) sqrt(256 / batch), which `scaled_lr` then multiplies.

    At width 768 this is MAE's 1.5e-4 for a batch of 256, and near the published CRATE-MAE's 3e-5 for one of 4096.
    Narrower models take larger steps. The rate that a step has in the end grows with the root of the batch, as fits
    Adam. At width 192 the rates for batches of 64 and 256 were tried, and four times the latter, which learns nothing
    (`docs/log.md`).
    """
    return 1.5e-4 * (768 / embed_dim) * math.sqrt(256 / batch_size)


def _out_of_limits(given: dict[str, Any]) -> Iterator[str]:
    for key, (is_right, limits) in _LIMITS.items():
        value = given[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"--{key.replace('_', '-')} is {value!r}, but must be a number."
        elif value is not None and not is_right(value):
            yield f"--{key.replace('_', '-')} is {value}, but must be {limits}."
    for key, choices in _CHOICES.items():
        if given[key] not in choices:
            yield f"--{key.replace('_', '-')} is {given[key]}, but must be one of {', '.join(map(str, choices))}."
    if given["epochs"] is not None and given["steps"] is not None:
        yield "--epochs and --steps both say how long to train: give one of them."
    if (given["mean"] is None) != (given["std"] is None):
        yield "--mean and --std belong together: give both or neither."


def _resolve_length(given: dict[str, Any], images: int, processes: int, mistakes: _Mistakes) -> None:
    """Batch size and number of steps, and what is counted in them."""
    share = max(1, given["accumulation"]) * processes
    if given["batch_size"] is None:
        given["batch_size"] = default_batch_size(images, share)
    batch = given["batch_size"]
    if batch > images:
        fits = f"--batch-size {images // share * share}" if images >= share else "fewer processes or --accumulation"
        mistakes.append(f"A batch of {batch} is larger than the {images} training images: the most is {fits}.")
    elif batch % share:
        nearest = max(share, round(batch / share) * share)
        mistakes.append(
            f"A batch of {batch} cannot be divided among {processes} process(es) x {given['accumulation']} accumulated "
            f"micro-batches: take --batch-size {nearest}."
        )
    if mistakes:
        return
    steps_per_epoch = images // batch
    if given["steps"] is None:
        given["steps"] = steps_per_epoch * (given["epochs"] or DEFAULT_EPOCHS)
    steps = given["steps"]
    if given["warmup_epochs"] is None:
        given["warmup_epochs"] = round(WARMUP_SHARE * steps / steps_per_epoch, 4)
    if round(given["warmup_epochs"] * steps_per_epoch) >= steps:
        mistakes.append(
            f"--warmup-epochs {given['warmup_epochs']:g} is as long as the whole run of {steps / steps_per_epoch:g} "
            "epochs: make it shorter."
        )
    given["log_steps"] = given["log_steps"] or max(1, min(50, steps // 200))
    given["monitor_steps"] = given["monitor_steps"] or max(steps // 20, min(steps_per_epoch, 100))


def _resolve_model(given: dict[str, Any], train: ImageSource | None) -> ModelConfig:
    """The model's configuration; without images (because of other mistakes) it is only checked for mistakes."""
    extra = dict(given["model_settings"] or {})
    if taken := [key for key in extra if key in _MODEL_OPTIONS]:
        raise UserError(
            f"Say --{taken[0].replace('in_chans', 'channels').replace('_', '-')} instead of a model setting."
        )
    channels = given["channels"] or 3
    name = given["model"] or "crate_mae_micro_patch4_32"
    if train is not None:
        facts = describe_images(train)
        channels = given["channels"] or facts.channels
        name = given["model"] or suggest_model(facts)[0]
    named = {key: given[key] for key in ("image_size", "mean", "std", "mask_tokens") if given[key] is not None}
    settings = {"in_chans": channels, "norm_pix_loss": given["norm_pix_loss"], "drop_path": given["drop_path"]}
    config = preset(name).replace(**extra, **named, **settings)
    if train is not None and given["mean"] is None and channels != 3:
        mean, std = channel_statistics(train, channels)
        config = config.replace(mean=tuple(round(x, 4) for x in mean), std=tuple(round(x, 4) for x in std))
    return config


def _resolve_machine(given: dict[str, Any], processes: int) -> None:
    if given["workers"] is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given["workers"] = max(0, min(8, cpus // processes - 1))
    given["threads"] = given["threads"] or torch.get_num_threads()
    given["checkpoint_epochs"] = given["checkpoint_epochs"] or 0
