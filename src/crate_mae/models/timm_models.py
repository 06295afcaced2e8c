"""Our encoders in timm's registry: `timm.create_model("crate_mae_base_patch16_224")` after `import crate_mae.timm`.

Every preset is there by its name, with random initialisation, and every trained model that comes with the library,
whose weights `pretrained=True` loads without a network. Arguments are those of timm's `VisionTransformer`, and of
CRATE's layers by their names in `CrateConfig`: `threshold=0.1`; with `patch_norm=True` patches are embedded as in the
official CRATE classifiers. To load a model of your own:

    timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": "runs/mine/model.safetensors"})

Importing this file imports timm and registers, and builds nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from crate_mae.data.documents import read_json, to_json
from crate_mae.models.config import (
    CONFIG_FILE,
    LAYER_SETTINGS,
    NOT_WRITTEN_DOWN,
    WEIGHTS_FILE,
    CrateConfig,
    ModelConfig,
    ViTConfig,
    config_from_settings,
    encoder_config,
)
from crate_mae.models.presets import bundled_folder, list_bundled, list_models, preset

# Names of models that no preset describes; their arguments do.
CUSTOM = {CrateConfig: "crate_mae_custom", ViTConfig: "vit_mae_custom"}


def timm_name(config: ModelConfig) -> str:
    """The name in timm's registry under which to build a configuration's encoder from its `encoder_arguments`."""
    return config.name if config.name in default_cfgs else CUSTOM[type(config)]


def timm_pretrained_cfg(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """What timm needs besides a model's arguments: how to prepare images, and the names of its first and last layer."""
    return {
        "num_classes": 0,
        "input_size": (config.in_chans, *config.image_size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": config.mean,
        "std": config.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2404.02446",
        **more,
    }


def write_encoder(model: Any, folder: Path) -> None:
    """Write the encoder of a model as a folder that timm and transformers open: timm's layout of the same two files.

    timm.create_model("local-dir:FOLDER", pretrained=True)          # after `import crate_mae.timm`
    transformers.AutoModel.from_pretrained("FOLDER")                # the same, in timm's wrapper

    Raises:
        UserError: if layers were changed so that the model's configuration no longer describes them.
    """
    from crate_mae.models.tensors import refuse_other_numbers  # it imports this file

    refuse_other_numbers(model)
    write_timm_folder(encoder_config(model.config), model.encoder.state_dict(), folder)


def write_timm_folder(config: ModelConfig, tensors: dict[str, Tensor], folder: Path, **arguments: Any) -> None:
    """Write an encoder's tensors and description in timm's layout; `arguments` are more of what builds it in timm."""
    pretrained = timm_pretrained_cfg(config)
    description: dict[str, Any] = {
        "architecture": timm_name(config),
        "num_classes": pretrained.pop("num_classes"),  # transformers takes it from here, and not twice
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": config.encoder_arguments() | arguments,
        "pretrained_cfg": pretrained,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(to_json(description) + "\n", encoding="utf-8")


def encoder_tensors(tensors: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors of an autoencoder's or classifier's file; those of an encoder's own file are all of them.

    If the image size differs from that in `pretrained_cfg`, positions are interpolated, as timm does it.
    """
    own: Any = encoder  # to a type checker, what a module has is tensors and modules
    if any(name.startswith("encoder.") for name in tensors):
        tensors = {
            name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")
        }
    # In the encoder's precision already here: timm may go on to add up the weights of the channels.
    found = {name: value.to(own.pos_embed.dtype) for name, value in tensors.items()}
    _, hh, ww = own.pretrained_cfg["input_size"]
    grid = [side // own.patch_embed.patch_size[0] for side in (hh, ww)]
    new_grid = list(own.patch_embed.grid_size)
    if grid != new_grid:
        found["pos_embed"] = resample_abs_pos_embed(found["pos_embed"], new_grid, grid, own.num_prefix_tokens)
    return found


def _config_of_bundled(name: str) -> ModelConfig:
    values = read_json(bundled_folder(name) / CONFIG_FILE)
    return config_from_settings({key: value for key, value in values.items() if key != "library"})


def _build(**arguments: Any) -> nn.Module:
    from crate_mae.models.encoder import encoder_of  # it imports timm, and timm, when imported, this file

    return encoder_of(**arguments)


def _register(name: str, config: ModelConfig) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        settings = {key: options[key] for key in LAYER_SETTINGS if key in options}
        if {*LAYER_SETTINGS} <= {*settings, *NOT_WRITTEN_DOWN}:  # a folder of ours, which has all that there were
            settings = {**NOT_WRITTEN_DOWN, **settings}
        changed = config.replace(**settings)  # which checks them, and makes the layers of those of our `create_model`
        options = {key: value for key, value in options.items() if key not in settings}
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            pretrained_filter_fn=encoder_tensors,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(changed.encoder_arguments() | options),
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The encoder of {name}: width {config.embed_dim}, {config.depth} layers."
    return register_model(entry)


CONFIGS = {name: preset(name) for name in list_models()} | {name: _config_of_bundled(name) for name in list_bundled()}
CONFIGS |= {name: dataclasses.replace(preset(f"{name[:-7]}_base_patch16_224"), name=name) for name in CUSTOM.values()}
default_cfgs = generate_default_cfgs(
    {
        name: timm_pretrained_cfg(
            config,
            **({"file": str(bundled_folder(name) / WEIGHTS_FILE)} if name in list_bundled() else {}),
        )
        for name, config in CONFIGS.items()
    }
)
for _name, _config in CONFIGS.items():
    _register(_name, _config)
