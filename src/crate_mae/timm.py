"""Our encoders in timm's registry: `import crate_mae.timm`, then `timm.create_model("crate_mae_base_patch16_224")`."""

import crate_mae.models.timm_models  # noqa: F401  # which registers them
