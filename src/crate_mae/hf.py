"""Our models in transformers: `import crate_mae.hf`, then `AutoModel.from_pretrained(FOLDER)` and its kin."""

import crate_mae.deployment.huggingface.modeling
import crate_mae.deployment.huggingface.processing  # noqa: F401  # each registers its classes
