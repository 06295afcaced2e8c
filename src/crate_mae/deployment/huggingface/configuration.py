"""A model's description as transformers keeps it: our own, below one key, beside what transformers writes."""

from typing import Any

from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from crate_mae.models.config import (
    DEFAULT_HEAD_POOLING,
    MASK_RATIO,
    MODEL_TYPE,
    ClassifierConfig,
    HeadPooling,
    ModelConfig,
    config_from_settings,
    settings_of,
)
from crate_mae.models.presets import preset

_DEFAULT = "crate_mae_base_patch16_224"


def _setting(name: str, meaning: str) -> Any:
    """A property that is one of our own settings, by transformers' name for it."""
    return property(lambda config: getattr(autoencoder_config(config), name), doc=meaning)


class CrateMAEConfig(BackboneConfigMixin, PreTrainedConfig):
    """What transformers needs to build a CRATE-MAE, or its twin ViT-MAE, again.

    Args:
        settings: a `ModelConfig` as a dictionary; by default CRATE-MAE base.
        pooling: of a classifier: how tokens become one vector.
        mask_ratio: share of patches that training hides.
        run: where the weights come from, by heading, for the card.
        out_features: of the backbone: the layers whose feature maps it gives, of `stage_names`; by default the last.
        out_indices: the same as numbers, 0 being "stem", what goes into the first layer.
        options: of every configuration of transformers, such as `id2label` and `num_labels`.

    Raises:
        UserError: for settings of a newer format, or that are unknown, missing or do not fit.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        pooling: HeadPooling = DEFAULT_HEAD_POOLING,
        mask_ratio: float = MASK_RATIO,
        run: dict[str, str] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **options: Any,
    ) -> None:
        config = preset(_DEFAULT) if settings is None else config_from_settings(settings)
        self.settings = settings_of(config)
        self.pooling: HeadPooling = pooling
        self.mask_ratio = mask_ratio
        self.run = run or {}
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, config.depth + 1))]
        options.pop("stage_names", None)  # which a file has too
        self.set_output_features_output_indices(out_features, out_indices)
        super().__init__(**options)

    image_size = _setting("image_size", "Height and width in pixels.")
    patch_size = _setting("patch_size", "Side of a patch in pixels.")
    num_channels = _setting("in_chans", "Channels of the images.")
    hidden_size = _setting("embed_dim", "Width of the encoder.")
    num_hidden_layers = _setting("depth", "Layers of the encoder.")
    num_attention_heads = _setting("num_heads", "Heads of the encoder.")


def autoencoder_config(config: CrateMAEConfig) -> ModelConfig:
    """Our own configuration of encoder and decoder.

    A function and no property, since transformers may hold two copies of this file, see `remote_code`, and the models
    of one copy get the configuration of the other.
    """
    return config_from_settings(config.settings)


def classifier_config(config: CrateMAEConfig) -> ClassifierConfig:
    """Our own configuration of a classifier with a configuration's labels."""
    names: Any = config.id2label
    classes = tuple(str(names[i]) for i in sorted(names))
    return ClassifierConfig(encoder=autoencoder_config(config), classes=classes, pooling=config.pooling)


AutoConfig.register(MODEL_TYPE, CrateMAEConfig, exist_ok=True)
