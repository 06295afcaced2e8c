"""Parameters around the functions of `theory`: layers, encoder, decoder, autoencoder, weights in and out."""

from crate_mae.models.autoencoder import MAEOutput, MaskedAutoencoder, build
from crate_mae.models.config import CrateConfig, ModelConfig, ViTConfig
from crate_mae.models.presets import create_model, list_models, preset

__all__ = [
    "CrateConfig",
    "MAEOutput",
    "MaskedAutoencoder",
    "ModelConfig",
    "ViTConfig",
    "build",
    "create_model",
    "list_models",
    "preset",
]
