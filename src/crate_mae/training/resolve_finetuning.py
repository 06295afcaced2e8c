"""From the options of `finetune` to a full configuration: defaults from the data, and all mistakes at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crate_mae.data import ImageSource, describe_images, finetune_transform
from crate_mae.errors import UserError
from crate_mae.models.classifier import ClassifierConfig
from crate_mae.models.config import ModelConfig
from crate_mae.models.presets import list_models, preset
from crate_mae.models.weights import load, read_config
from crate_mae.training.config import FinetuneConfig, inseparable
from crate_mae.training.finetuning import Finetuning, StartingPoint
from crate_mae.training.labelled import open_labelled
from crate_mae.training.options import begin, resolve_length, resolve_machine
from crate_mae.training.resolve import with_measured_statistics
from crate_mae.training.task import Resolved

DEFAULT_EPOCHS = 50
WARMUP_SHARE = 0.1
_CONVERTIBLE = (1, 3)


def resolve_finetuning(options: dict[str, Any], processes: int, newest: Path | None) -> Resolved:
    """Fill in every option that is None, from the model, the data and the machine.

    Args:
        options: all options of `crate_mae.finetune` by name.
        processes: number of training processes.
        newest: the newest checkpoint of the run. A run that has one no longer needs the model that it began with.

    Raises:
        UserError: with all mistakes.
    """
    given = dict(options)
    mistakes = begin(given)
    images = start = None
    with mistakes.collected():
        share = 1.0 if mistakes else given["labels"]
        images = open_labelled(given["train"], given["val"], share, given["seed"])
        resolve_length(
            given,
            len(images.train),
            processes,
            mistakes,
            epochs=DEFAULT_EPOCHS,
            warmup=WARMUP_SHARE,
            inseparable=2 if mistakes else inseparable(given["mixup"], given["cutmix"]),
        )
    with mistakes.collected():
        start = _starting_point(given, images.train if images else None, newest)
    mistakes.raise_if_any()
    assert images is not None and start is not None

    resolve_machine(given, processes)
    given |= {
        "train": images.train_name,
        "val": images.held_out_name,
        "model": _full_model_name(given["model"]),
        "image_size": start.image_size,
        "lr": given["lr"] or default_finetune_lr(given["batch_size"]),
        "monitor_steps": given["monitor_steps"] or _steps_between_validations(given, images.train, images.held_out),
    }
    del given["epochs"]
    config = FinetuneConfig(**given)
    return Resolved(config, lambda: Finetuning(config, images, start))


def default_finetune_lr(batch_size: int) -> float:
    """Learning rate of the head per 256 images, 1.5e-3 sqrt(256 / batch), which `scaled_lr` then multiplies.

    The rate that a step has in the end grows with the root of the batch, as fits Adam; at a batch of 1024 it is near
    that of MAE. Tried at width 192 with batches of 32 on 500 images, one run each: a quarter of this was no different
    within the noise, three times this clearly worse.
    """
    return 1.5e-3 * math.sqrt(256 / batch_size)


def _starting_point(given: dict[str, Any], train: ImageSource | None, newest: Path | None) -> StartingPoint:
    """The encoder to begin with; without images (because of other mistakes) it is only checked for mistakes."""
    name, weights = str(given["model"]), None
    if name.startswith("timm:"):
        raise UserError(
            f"{name} cannot be fine-tuned here: MODEL is a run folder, a folder with a model, hf:user/name, "
            "or a name from `crate-mae models`."
        )
    channels = 3 if train is None else describe_images(train).channels
    if newest is not None:
        config = _encoder_config(read_config(newest))
    elif name in list_models():
        config = preset(name).replace(in_chans=channels)
        config = config if train is None else with_measured_statistics(config, train)
    else:
        loaded = load(name)
        config, weights = _encoder_config(loaded.config), loaded.encoder.state_dict()
    if train is not None and channels != config.in_chans and not {channels, config.in_chans} <= set(_CONVERTIBLE):
        raise UserError(
            f"{name} takes images of {config.in_chans} channels, but those of {train.name} have {channels}.\n"
            "Only grey and colour are converted into each other: give a model that was made for these images."
        )
    config = config.replace(drop_path=given["drop_path"])
    size = config.image_size if given["image_size"] is None else given["image_size"]
    resized = config.replace(image_size=size)  # refuses a size that its patches do not divide
    if weights is None:
        config = resized
    finetune_transform(resized.image_size, config.in_chans, config.mean, config.std, rand_augment=given["rand_augment"])
    return StartingPoint(config, weights, resized.image_size)


def _encoder_config(config: ModelConfig | ClassifierConfig) -> ModelConfig:
    return config.encoder if isinstance(config, ClassifierConfig) else config


def _full_model_name(model: str | Path) -> str:
    """A name by which the same model is found from any folder."""
    name = str(model)
    return name if name in list_models() or name.startswith("hf:") else str(Path(name).expanduser().resolve())


def _steps_between_validations(given: dict[str, Any], train: ImageSource, val: ImageSource) -> int:
    """An epoch, or as many as it takes to train on as many images as there are to validate on."""
    return math.ceil(len(val) / len(train)) * (len(train) // given["batch_size"])
