"""CRATE-MAE, the white-box masked autoencoder: train it, use it and look inside.

Names are imported when first used, so that `import crate_mae` and `crate-mae --help` take no time.

timm and transformers find a model by its name in their own registries. `import crate_mae.timm` and
`import crate_mae.hf` add our models; `import crate_mae` does so only if timm, or an automatic class of transformers,
has been loaded before.
"""

import sys
from importlib import import_module

from crate_mae.lazy import lazy_package

__getattr__, __dir__, __all__ = lazy_package(__name__, __file__)

for _theirs, _ours in {"timm": "crate_mae.timm", "transformers.models.auto.modeling_auto": "crate_mae.hf"}.items():
    if _theirs in sys.modules:
        import_module(_ours)
