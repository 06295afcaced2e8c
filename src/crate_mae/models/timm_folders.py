"""An encoder as a folder that timm and transformers open: `model.safetensors`, and `config.json` as timm writes it.

timm.create_model("local-dir:FOLDER", pretrained=True)          # after `import crate_mae`
transformers.AutoModel.from_pretrained("FOLDER")                # the same, in timm's wrapper
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from crate_mae.models.classifier import Classifier
from crate_mae.models.config import ModelConfig
from crate_mae.models.timm_models import timm_arguments, timm_name, timm_pretrained_cfg
from crate_mae.models.weights import CONFIG_FILE, WEIGHTS_FILE, Model


def write_encoder(model: Model, folder: Path) -> None:
    """Write the encoder of a model in timm's layout."""
    config = model.config.encoder if isinstance(model, Classifier) else model.config
    write_timm_folder(config, model.encoder.state_dict(), folder)


def write_timm_folder(config: ModelConfig, tensors: dict[str, Tensor], folder: Path, **arguments: Any) -> None:
    """Write an encoder's tensors and description in timm's layout; `arguments` are more of what builds it in timm."""
    pretrained = timm_pretrained_cfg(config)
    description: dict[str, Any] = {
        "architecture": timm_name(config),
        "num_classes": pretrained.pop("num_classes"),  # transformers takes it from here, and not twice
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": timm_arguments(config) | arguments,
        "pretrained_cfg": pretrained,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
