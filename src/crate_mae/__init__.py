"""Masked completion by a white-box transformer: CRATE-MAE, to train, to use and to look inside.

Names are imported when first used, so that `import crate_mae` and `crate-mae --help` cost nothing.
"""

from typing import TYPE_CHECKING

from crate_mae.lazy import lazy_names

if TYPE_CHECKING:
    from crate_mae.commands.doctor import doctor
    from crate_mae.commands.pretrain import pretrain, resume
    from crate_mae.commands.reconstruct import reconstruct
    from crate_mae.commands.try_digits import try_digits
    from crate_mae.errors import RunStopped, UserError
    from crate_mae.models.autoencoder import MAEOutput, MaskedAutoencoder
    from crate_mae.models.official import from_official, to_official
    from crate_mae.models.presets import create_model, list_models
    from crate_mae.models.tracing import trace
    from crate_mae.models.weights import load, save

_HOMES = {
    "MAEOutput": "models.autoencoder",
    "MaskedAutoencoder": "models.autoencoder",
    "RunStopped": "errors",
    "UserError": "errors",
    "create_model": "models.presets",
    "doctor": "commands.doctor",
    "from_official": "models.official",
    "list_models": "models.presets",
    "load": "models.weights",
    "pretrain": "commands.pretrain",
    "reconstruct": "commands.reconstruct",
    "resume": "commands.pretrain",
    "save": "models.weights",
    "to_official": "models.official",
    "trace": "models.tracing",
    "try_digits": "commands.try_digits",
}

__all__ = [
    "MAEOutput",
    "MaskedAutoencoder",
    "RunStopped",
    "UserError",
    "create_model",
    "doctor",
    "from_official",
    "list_models",
    "load",
    "pretrain",
    "reconstruct",
    "resume",
    "save",
    "to_official",
    "trace",
    "try_digits",
]

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
