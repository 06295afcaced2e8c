"""How `config.json` describes a model: in this library's own folders, and in those that transformers opens.

| folder | `config.json` |
|---|---|
| ours | `library`, `format_version`, and the settings of a `ModelConfig` or `ClassifierConfig` |
| of transformers | what transformers writes, and `settings`: `format_version` and those of a `ModelConfig` |
| of timm | what timm writes: an encoder alone; see `weights.write_encoder` |
"""

import json
from collections.abc import Mapping
from typing import Any

from crate_mae.errors import UserError, install_command
from crate_mae.models.classifier import DEFAULT_HEAD_POOLING, ClassifierConfig
from crate_mae.models.config import ModelConfig, config_from_dict

LIBRARY = "crate-mae"
FORMAT_VERSION = 1  # a description without one is of version 1
MODEL_TYPE = "crate_mae"  # in transformers
ENCODER_CLASS = "CrateMAEModel"  # of transformers, whose folders have no decoder
_CLASSIFIER_CLASS = "CrateMAEForImageClassification"

Config = ModelConfig | ClassifierConfig


def describe(config: Config) -> dict[str, Any]:
    """A configuration as our own `config.json` has it."""
    return {"library": LIBRARY, "format_version": FORMAT_VERSION, **config.to_dict()}


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """A configuration as a part of transformers' `config.json`."""
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}))


def config_from_settings(settings: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `settings_of`.

    Raises:
        UserError: for settings of a newer format, or that are unknown, missing or do not fit.
    """
    return config_from_dict(without_version(settings))


def without_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """A description less its version.

    Raises:
        UserError: if the version is not known here.
    """
    version = values.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"It has format version {version}, and this {LIBRARY} knows versions up to {FORMAT_VERSION}.\n"
            f"Get a newer version, and install it: {install_command()}"
        )
    return {key: value for key, value in values.items() if key != "format_version"}


def is_of_timm(values: Any) -> bool:
    """Whether `config.json` is in timm's layout."""
    return isinstance(values, dict) and "pretrained_cfg" in values and "library" not in values


def is_of_transformers(values: Any) -> bool:
    """Whether `config.json` describes one of our models to transformers."""
    return (
        isinstance(values, dict) and values.get("model_type") == MODEL_TYPE and isinstance(values.get("settings"), dict)
    )


def is_encoder_of_transformers(values: Any) -> bool:
    """Whether that model is an encoder alone."""
    return is_of_transformers(values) and values.get("architectures") == [ENCODER_CLASS]


def config_from_transformers(values: Mapping[str, Any]) -> Config:
    """The configuration of a model that transformers wrote.

    Raises:
        UserError: as `config_from_settings`, or for invalid labels.
    """
    config = config_from_settings(values["settings"])
    if values.get("architectures") != [_CLASSIFIER_CLASS]:
        return config
    labels = values.get("id2label")
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        raise UserError("A classifier of transformers needs id2label: from number to name of every class.")
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return ClassifierConfig(encoder=config, classes=names, pooling=values.get("pooling", DEFAULT_HEAD_POOLING))
