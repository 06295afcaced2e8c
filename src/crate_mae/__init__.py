"""Masked completion by a white-box transformer: CRATE-MAE, to train, to use and to look inside.

Names are imported when first used, so that `import crate_mae` and `crate-mae --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crate_mae.commands.pretrain import pretrain, resume
    from crate_mae.commands.reconstruct import reconstruct
    from crate_mae.errors import RunStopped, UserError
    from crate_mae.models.autoencoder import MAEOutput, MaskedAutoencoder
    from crate_mae.models.official import from_official, to_official
    from crate_mae.models.presets import create_model, list_models
    from crate_mae.models.tracing import trace
    from crate_mae.models.weights import load, save

_HOMES = {
    "MAEOutput": "crate_mae.models.autoencoder",
    "MaskedAutoencoder": "crate_mae.models.autoencoder",
    "RunStopped": "crate_mae.errors",
    "UserError": "crate_mae.errors",
    "create_model": "crate_mae.models.presets",
    "from_official": "crate_mae.models.official",
    "list_models": "crate_mae.models.presets",
    "load": "crate_mae.models.weights",
    "pretrain": "crate_mae.commands.pretrain",
    "reconstruct": "crate_mae.commands.reconstruct",
    "resume": "crate_mae.commands.pretrain",
    "save": "crate_mae.models.weights",
    "to_official": "crate_mae.models.official",
    "trace": "crate_mae.models.tracing",
}

__all__ = [
    "MAEOutput",
    "MaskedAutoencoder",
    "RunStopped",
    "UserError",
    "create_model",
    "from_official",
    "list_models",
    "load",
    "pretrain",
    "reconstruct",
    "resume",
    "save",
    "to_official",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
