"""From the options of `pretrain` to a full configuration: defaults from the data, and all mistakes at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crate_mae.data import ImageSource, channel_statistics, describe_images, suggest_model
from crate_mae.errors import UserError
from crate_mae.models.config import ModelConfig
from crate_mae.models.presets import preset
from crate_mae.training.config import PretrainConfig
from crate_mae.training.images import open_images
from crate_mae.training.options import begin, resolve_length, resolve_machine
from crate_mae.training.pretraining import Pretraining
from crate_mae.training.task import Resolved

DEFAULT_EPOCHS = 100
WARMUP_SHARE = 0.05
_MODEL_OPTIONS = ("image_size", "in_chans", "mean", "std", "mask_tokens", "norm_pix_loss", "drop_path")


def resolve_pretraining(options: dict[str, Any], processes: int, newest: Path | None) -> Resolved:  # noqa: ARG001
    """Fill in every option that is None, from the data and the machine.

    Args:
        options: all options of `crate_mae.pretrain` by name.
        processes: number of training processes.
        newest: the newest checkpoint of the run, which pretraining needs for nothing here.

    Raises:
        UserError: with all mistakes.
    """
    # On the command line, words of a setting's name are joined by dashes like those of an option.
    settings = {key.replace("-", "_"): value for key, value in (options["model_settings"] or {}).items()}
    given = {**options, "model_settings": settings}
    mistakes = begin(given)
    if (given["mean"] is None) != (given["std"] is None):
        mistakes.append("--mean and --std belong together: give both or neither.")
    images = model = None
    with mistakes.collected():
        images = open_images(given["data"], given["val"])
        resolve_length(given, len(images.train), processes, mistakes, epochs=DEFAULT_EPOCHS, warmup=WARMUP_SHARE)
    with mistakes.collected():
        model = _resolve_model(given, images.train if images and not mistakes else None)
    mistakes.raise_if_any()
    assert images is not None and model is not None

    resolve_machine(given, processes)
    steps_per_epoch = len(images.train) // given["batch_size"]
    given |= {
        "data": images.train_name,
        "val": images.held_out_name,
        "model": model.name,
        "image_size": model.image_size,
        "channels": model.in_chans,
        "mean": model.mean,
        "std": model.std,
        "mask_tokens": model.mask_tokens,
        "norm_pix_loss": model.norm_pix_loss,
        "drop_path": model.drop_path,
        "lr": given["lr"] or default_base_lr(model.embed_dim, given["batch_size"]),
        "monitor_steps": given["monitor_steps"] or max(given["steps"] // 20, min(steps_per_epoch, 100)),
    }
    del given["epochs"]
    config = PretrainConfig(**given)
    return Resolved(config, lambda: Pretraining(config, images, model))


def default_base_lr(embed_dim: int, batch_size: int) -> float:
    """Learning rate per 256 images, 1.5e-4 (768 / d) sqrt(256 / batch), which `scaled_lr` then multiplies.

    At width 768 this is MAE's 1.5e-4 for a batch of 256, and near the published CRATE-MAE's 3e-5 for one of 4096.
    Narrower models take larger steps. The rate that a step has in the end grows with the root of the batch, as fits
    Adam. At width 192 the rates for batches of 64 and 256 were tried, and four times the latter, which learns nothing
    (`docs/log.md`).
    """
    return 1.5e-4 * (768 / embed_dim) * math.sqrt(256 / batch_size)


def _resolve_model(given: dict[str, Any], train: ImageSource | None) -> ModelConfig:
    """The model's configuration; without images (because of other mistakes) it is only checked for mistakes."""
    extra = given["model_settings"]
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
    return config if train is None or given["mean"] is not None else with_measured_statistics(config, train)


def with_measured_statistics(config: ModelConfig, train: ImageSource) -> ModelConfig:
    """A configuration with the mean and deviation of the images' own channels, unless these are red, green and blue."""
    if config.in_chans == 3:
        return config
    mean, std = channel_statistics(train, config.in_chans)
    return config.replace(mean=tuple(round(x, 4) for x in mean), std=tuple(round(x, 4) for x in std))
