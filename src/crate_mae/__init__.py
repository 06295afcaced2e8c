"""CRATE-MAE, the white-box masked autoencoder: train it, use it and look inside.

Names are imported when first used, so that `import crate_mae` and `crate-mae --help` take no time. The models are
registered with timm and transformers when those are imported, before or after this package: see `after_import`.
"""

from crate_mae.after_import import import_after
from crate_mae.lazy import lazy_package

__getattr__, __dir__, __all__ = lazy_package(__name__, __file__)

import_after(
    {
        "timm": "crate_mae.models.timm_models",
        "transformers.models.auto.configuration_auto": "crate_mae.deployment.huggingface.configuration",
        "transformers.models.auto.modeling_auto": "crate_mae.deployment.huggingface.modeling",
        "transformers.models.auto.image_processing_auto": "crate_mae.deployment.huggingface.processing",
    }
)
