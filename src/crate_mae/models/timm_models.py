"""Our encoders in timm's registry: `timm.create_model("crate_mae_base_patch16_224")` after `import crate_mae`.

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

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from crate_mae.data.documents import read_json
from crate_mae.errors import UserError
from crate_mae.models.config import CrateConfig, ModelConfig, ViTConfig, config_from_dict
from crate_mae.models.presets import bundled_folder, list_bundled, list_models, preset
from crate_mae.models.tensors import described_tensors, misfits

# Names of models that no preset describes; their arguments do.
CUSTOM = {CrateConfig: "crate_mae_custom", ViTConfig: "vit_mae_custom"}

_MOST_LAYERS = 200
_LARGEST_ARGUMENT = 2**16

_CRATE_OPTIONS = ("layer", "step_size", "threshold", "output_projection", "ista_skip", "overcomplete")


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """The arguments, JSON-able, with which timm's `create_model` builds the encoder that a configuration describes."""
    shared = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "drop_path_rate": config.drop_path,
    }
    if isinstance(config, CrateConfig):
        return shared | {key: getattr(config, key) for key in (*_CRATE_OPTIONS, "init")}
    assert isinstance(config, ViTConfig)
    return shared | {"mlp_ratio": config.mlp_ratio}


def timm_name(config: ModelConfig) -> str:
    """The name in timm's registry under which to build a configuration's encoder from `timm_arguments`."""
    return config.name if config.name in default_cfgs else CUSTOM[type(config)]


def any_size_encoder(config: ModelConfig, **arguments: Any) -> nn.Module:
    """The encoder of a configuration, with random initialisation, for images of any size in whole patches."""
    return timm.create_model(timm_name(config), **timm_arguments(config), **arguments, dynamic_img_size=True)


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


def refuse_timm_misfits(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare the arguments in a folder of timm's layout with its weights, before timm builds a model from them.

    Args:
        folder: with `model.safetensors`; of networks of timm itself any file of weights.
        description: its `config.json`.

    Raises:
        UserError: if the arguments describe another model than that of the weights, or one that is too large.
    """
    name, arguments = description.get("architecture"), description.get("model_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{folder}/config.json does not name an architecture of timm and its arguments.")
    if name in _configs:
        _refuse_other_encoder(folder / "model.safetensors", _configs[name], arguments)
        return
    if wrong := [key for key, value in arguments.items() if _is_large(key, value)]:
        raise UserError(f"{folder}/config.json: {wrong[0]} of {name} is larger than in any network.")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            numbers = sum(value.numel() for value in timm.create_model(name, **arguments, num_classes=0).parameters())
    except Exception:  # timm raises many kinds: it says what is wrong when it opens the folder
        return
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if numbers > stored:
        raise UserError(f"{folder} describes a {name} of {numbers:,} numbers, but holds only {stored:,} bytes.")


def _refuse_other_encoder(path: Path, like: ModelConfig, arguments: Mapping[str, Any]) -> None:
    """Compare the arguments of one of our encoders with a file of its weights."""
    names = {"img_size": "image_size", "drop_path_rate": "drop_path"}
    known = {names.get(key, key): key for key in timm_arguments(like)}
    config = like.replace(**{setting: arguments[key] for setting, key in known.items() if key in arguments})
    found = described_tensors(path)
    sizes = {
        "cls_token": (1, 1, config.embed_dim),
        "pos_embed": (1, 1 + config.grid_size[0] * config.grid_size[1], config.embed_dim),
    }
    layers = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if layers != config.depth or any(name not in found or found[name].shape != sizes[name] for name in sizes):
        raise UserError(f"{path} holds the weights of another encoder than config.json describes.")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = any_size_encoder(config, **({"patch_norm": True} if arguments.get("patch_norm") else {})).state_dict()
    if problems := misfits(found, wanted):
        raise UserError(f"{path} holds the weights of another encoder than config.json describes: {problems}.")


def _is_large(key: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > _MOST_LAYERS or any(_is_large(key, item) for item in value)
    if isinstance(value, dict):
        return any(_is_large(f"{key}.{name}", item) for name, item in value.items())
    most = _MOST_LAYERS if "depth" in key or "layers" in key else _LARGEST_ARGUMENT
    return isinstance(value, (int, float)) and not -most <= value <= most


def _config_of_bundled(name: str) -> ModelConfig:
    values = read_json(bundled_folder(name) / "config.json")
    return config_from_dict({key: value for key, value in values.items() if key not in ("library", "format_version")})


def _build(**options: Any) -> nn.Module:
    from crate_mae.models.encoder import MaskedEncoder, NormedPatchEmbed, crate_block, vit_block

    if "mlp_ratio" in options:
        return MaskedEncoder(block=vit_block(), **options)
    of_layers = {key: options.pop(key) for key in _CRATE_OPTIONS}
    block = crate_block(**of_layers)
    if not options.pop("patch_norm", False):
        return MaskedEncoder(block=block, **options)
    encoder = MaskedEncoder(block=block, embed_layer=NormedPatchEmbed, **options)
    encoder.norm.eps = NormedPatchEmbed.EPS  # pyright: ignore[reportArgumentType]  # of the same models
    return encoder


def _register(name: str, config: ModelConfig) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            pretrained_filter_fn=encoder_tensors,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(timm_arguments(config) | options),
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The encoder of {name}: width {config.embed_dim}, {config.depth} layers."
    return register_model(entry)


_configs = {name: preset(name) for name in list_models()} | {name: _config_of_bundled(name) for name in list_bundled()}
_configs |= {name: dataclasses.replace(preset(f"{name[:-7]}_base_patch16_224"), name=name) for name in CUSTOM.values()}
default_cfgs = generate_default_cfgs(
    {
        name: timm_pretrained_cfg(
            config,
            **({"file": str(bundled_folder(name) / "model.safetensors")} if name in list_bundled() else {}),
        )
        for name, config in _configs.items()
    }
)
for _name, _config in _configs.items():
    _register(_name, _config)
