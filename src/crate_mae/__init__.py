"""CRATE-MAE, the white-box masked autoencoder: train it, use it and look inside.

Names are imported when first used, so that `import crate_mae` and `crate-mae --help` take no time. The models are
registered with timm and transformers when those are imported, before or after this package: see `after_import`.
"""

from typing import TYPE_CHECKING

from crate_mae.after_import import import_after
from crate_mae.lazy import lazy_names

if TYPE_CHECKING:
    from crate_mae.commands.compare import compare
    from crate_mae.commands.convert import convert
    from crate_mae.commands.doctor import doctor
    from crate_mae.commands.embed import embed
    from crate_mae.commands.estimate import estimate
    from crate_mae.commands.evaluate import eval_fewshot, eval_knn, eval_linear
    from crate_mae.commands.evaluate_reconstruction import eval_reconstruction
    from crate_mae.commands.export import export
    from crate_mae.commands.finetune import finetune
    from crate_mae.commands.inspect import inspect
    from crate_mae.commands.predict import predict
    from crate_mae.commands.pretrain import pretrain, resume
    from crate_mae.commands.push import push
    from crate_mae.commands.reconstruct import reconstruct
    from crate_mae.commands.try_digits import try_digits
    from crate_mae.commands.viz import viz_attention, viz_layers, viz_pca
    from crate_mae.errors import RunStopped, UserError
    from crate_mae.models.autoencoder import MAEOutput, MaskedAutoencoder
    from crate_mae.models.classifier import Classifier
    from crate_mae.models.official import from_official, to_official
    from crate_mae.models.presets import create_model, list_models
    from crate_mae.models.tracing import trace
    from crate_mae.models.weights import load, save

_HOMES = {
    "Classifier": "models.classifier",
    "MAEOutput": "models.autoencoder",
    "MaskedAutoencoder": "models.autoencoder",
    "RunStopped": "errors",
    "UserError": "errors",
    "compare": "commands.compare",
    "convert": "commands.convert",
    "create_model": "models.presets",
    "doctor": "commands.doctor",
    "finetune": "commands.finetune",
    "embed": "commands.embed",
    "estimate": "commands.estimate",
    "eval_fewshot": "commands.evaluate",
    "eval_knn": "commands.evaluate",
    "eval_linear": "commands.evaluate",
    "eval_reconstruction": "commands.evaluate_reconstruction",
    "export": "commands.export",
    "from_official": "models.official",
    "inspect": "commands.inspect",
    "list_models": "models.presets",
    "load": "models.weights",
    "predict": "commands.predict",
    "pretrain": "commands.pretrain",
    "push": "commands.push",
    "reconstruct": "commands.reconstruct",
    "resume": "commands.pretrain",
    "save": "models.weights",
    "to_official": "models.official",
    "trace": "models.tracing",
    "try_digits": "commands.try_digits",
    "viz_attention": "commands.viz",
    "viz_layers": "commands.viz",
    "viz_pca": "commands.viz",
}

__all__ = [
    "Classifier",
    "MAEOutput",
    "MaskedAutoencoder",
    "RunStopped",
    "UserError",
    "compare",
    "convert",
    "create_model",
    "doctor",
    "embed",
    "estimate",
    "eval_fewshot",
    "eval_knn",
    "eval_linear",
    "eval_reconstruction",
    "export",
    "finetune",
    "from_official",
    "inspect",
    "list_models",
    "load",
    "predict",
    "pretrain",
    "push",
    "reconstruct",
    "resume",
    "save",
    "to_official",
    "trace",
    "try_digits",
    "viz_attention",
    "viz_layers",
    "viz_pca",
]

__getattr__ = lazy_names(__name__, _HOMES)

import_after(
    {
        "timm": "crate_mae.models.timm_models",
        "transformers.models.auto.configuration_auto": "crate_mae.deployment.huggingface.configuration",
        "transformers.models.auto.modeling_auto": "crate_mae.deployment.huggingface.modeling",
        "transformers.models.auto.image_processing_auto": "crate_mae.deployment.huggingface.processing",
    }
)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
