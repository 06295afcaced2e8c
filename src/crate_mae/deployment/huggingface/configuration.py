"""A model's description as transformers keeps it: our own, below one key, beside what transformers writes."""

from typing import Any

from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from crate_mae.models.classifier import DEFAULT_HEAD_POOLING, ClassifierConfig, HeadPooling
from crate_mae.models.config import ModelConfig
from crate_mae.models.description import MODEL_TYPE, config_from_settings, settings_of
from crate_mae.models.presets import preset

_DEFAULT = "crate_mae_base_patch16_224"


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
        mask_ratio: float = 0.75,
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

    @property
    def autoencoder(self) -> ModelConfig:
        """Our own configuration of encoder and decoder."""
        return config_from_settings(self.settings)

    @property
    def classifier(self) -> ClassifierConfig:
        """Our own configuration of a classifier with these labels."""
        names: Any = self.id2label
        classes = tuple(str(names[i]) for i in sorted(names))
        return ClassifierConfig(encoder=self.autoencoder, classes=classes, pooling=self.pooling)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.autoencoder.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.autoencoder.patch_size

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.autoencoder.in_chans

    @property
    def hidden_size(self) -> int:
        """Width of the encoder."""
        return self.autoencoder.embed_dim

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the encoder."""
        return self.autoencoder.depth

    @property
    def num_attention_heads(self) -> int:
        """Heads of the encoder."""
        return self.autoencoder.num_heads


AutoConfig.register(MODEL_TYPE, CrateMAEConfig, exist_ok=True)
