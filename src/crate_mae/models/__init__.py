"""Parameters around the functions of `theory`: layers, encoder, decoder, autoencoder, weights in and out.

Names are imported when first used, as in `crate_mae` itself.
"""

from typing import TYPE_CHECKING

from crate_mae.lazy import lazy_names

if TYPE_CHECKING:
    from crate_mae.models.autoencoder import MAEOutput, MaskedAutoencoder, build
    from crate_mae.models.config import CrateConfig, ModelConfig, ViTConfig
    from crate_mae.models.presets import create_model, list_models, preset

_HOMES = {
    "CrateConfig": "config",
    "MAEOutput": "autoencoder",
    "MaskedAutoencoder": "autoencoder",
    "ModelConfig": "config",
    "ViTConfig": "config",
    "build": "autoencoder",
    "create_model": "presets",
    "list_models": "presets",
    "preset": "presets",
}

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

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
