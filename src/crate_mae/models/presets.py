"""Models by name.

Every `crate_mae_<size>` has two ViT-MAE twins: `vit_mae_<size>` of the same width, depth and heads on both sides, and
`vit_mae_<size>_matched` of (nearly) the same number of parameters. A ViT block of width d has about 12 d^2 weights
where a CRATE layer has 3 d^2, so the matched twin has half the width, with heads of the same dimension.
`crate_mae_<size>_isometric` is the same model, initialised so that tokens do not collapse (`models.initialization`),
and `crate_mae_<size>_visible` is that with mask tokens only at the decoder, as ViT-MAE has them: the encoder sees
visible patches alone. `crate_mae_<size>_compressing` is `_visible` with layers that provably compress, and
`crate_mae_<size>_monotone` with layers whose sparse coding provably lowers its objective, too (`models.monotone`);
these have 2 d^2 weights, and `vit_mae_<size>_monotone_matched` has as many parameters.
`crate_mae_micro_wide` is for hours of training, not days: like `_visible`, but with few wide layers
(`results/cifar10_small_color`), for images of 32 to 128 pixels, always in 8 x 8 patches; with twins of its own, and
`crate_mae_micro_wide_compressing` and `crate_mae_micro_wide_monotone` likewise.
`vit_mae_{small,base,large}_published` are the baselines that the CRATE-MAE paper's tables compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_mae.errors import UserError, did_you_mean
from crate_mae.models.config import CrateConfig, ModelConfig, ViTConfig, check_settings

if TYPE_CHECKING:  # names are known, to timm for one, before anything is built: see `models.timm_models`
    from crate_mae.models.autoencoder import MaskedAutoencoder

_BUNDLED = Path(__file__).parent / "bundled"

# size: (width, heads, depth of either side, patch, image)
_SIZES = {
    "nano_patch2_8": (96, 4, 4, 2, 8),
    "micro_patch4_32": (192, 6, 6, 4, 32),
    "tiny_patch4_32": (384, 6, 12, 4, 32),
    "tiny_patch16_224": (384, 6, 12, 16, 224),
    "small_patch16_224": (576, 12, 12, 16, 224),
    "base_patch16_224": (768, 12, 12, 16, 224),
    "large_patch16_224": (1024, 16, 24, 16, 224),
}

# Width of monotone layers: width and heads of the ViT with as many parameters; 12 w^2 is about 2 d^2.
_MONOTONE_TWINS = {
    96: (40, 2),
    192: (80, 2),
    384: (160, 4),
    512: (216, 4),
    576: (240, 5),
    768: (320, 5),
    1024: (420, 7),
}

# Few wide layers.
_WIDE = {"embed_dim": 512, "num_heads": 8, "depth": 3}
_WIDE |= {"decoder_embed_dim": 192, "decoder_num_heads": 6, "decoder_depth": 2}

# Images of 8 x 8 patches each: patch, image, and widths of the ViTs with as many parameters as published and monotone
# layers make, with the maps from and to patches, which grow with these.
_WIDE_SHAPES = ((4, 32, 256, 216), (8, 64, 264, 220), (12, 96, 268, 224), (16, 128, 272, 232))

# size: (width, heads, depth, decoder width, decoder heads, decoder depth)
_PUBLISHED_VIT = {
    "small": (384, 6, 12, 512, 16, 8),
    "base": (768, 12, 12, 768, 16, 8),
    "large": (1024, 16, 24, 1024, 16, 8),
}


@cache
def _presets() -> dict[str, ModelConfig]:
    presets = {config.name: config for config in _of_all_sizes()}
    return presets | {config.name: config for config in (*_wide(presets), *_published_vits())}


def _of_all_sizes() -> Iterator[ModelConfig]:
    for size, (width, heads, depth, patch, image) in _SIZES.items():
        stem, _, shape = size.partition("_")
        shared: dict[str, Any] = {"depth": depth, "decoder_depth": depth}
        shared |= {"patch_size": patch, "image_size": (image, image)}
        crate = CrateConfig(name=f"crate_mae_{size}", embed_dim=width, num_heads=heads, **shared)
        isometric = crate.replace(name=f"crate_mae_{stem}_isometric_{shape}", init="isometric")
        visible = isometric.replace(name=f"crate_mae_{stem}_visible_{shape}", mask_tokens="decoder")
        yield from (crate, isometric, visible)
        for layer in ("compressing", "monotone"):
            yield visible.replace(name=f"crate_mae_{stem}_{layer}_{shape}", layer=layer)
        for kind, (twin_width, twin_heads) in {
            "": (width, heads),
            "_matched": (width // 2, heads // 2),
            "_monotone_matched": _MONOTONE_TWINS[width],
        }.items():
            name = f"vit_mae_{stem}{kind}_{shape}"
            yield ViTConfig(name=name, embed_dim=twin_width, num_heads=twin_heads, **shared)


def _wide(presets: Mapping[str, ModelConfig]) -> Iterator[ModelConfig]:
    half = {key: value if key.endswith("depth") else value // 2 for key, value in _WIDE.items()}
    twin = dict(_WIDE)
    for side in ("", "decoder_"):
        twin[f"{side}embed_dim"], twin[f"{side}num_heads"] = _MONOTONE_TWINS[_WIDE[f"{side}embed_dim"]]
    for stem, like, settings in (
        ("crate_mae_micro_wide", "crate_mae_micro_visible_patch4_32", _WIDE),
        ("crate_mae_micro_wide_compressing", "crate_mae_micro_compressing_patch4_32", _WIDE),
        ("crate_mae_micro_wide_monotone", "crate_mae_micro_monotone_patch4_32", _WIDE),
        ("vit_mae_micro_wide", "vit_mae_micro_patch4_32", _WIDE),
        ("vit_mae_micro_wide_matched", "vit_mae_micro_patch4_32", half),
        ("vit_mae_micro_wide_monotone_matched", "vit_mae_micro_patch4_32", twin),
    ):
        for patch, image, matched, monotone_matched in _WIDE_SHAPES:
            changed: dict[str, Any] = settings | {"patch_size": patch, "image_size": (image, image)}
            if stem.endswith("matched"):
                changed["embed_dim"] = monotone_matched if "monotone" in stem else matched
            yield presets[like].replace(name=f"{stem}_patch{patch}_{image}", **changed)


def _published_vits() -> Iterator[ModelConfig]:
    for size, (width, heads, depth, decoder_width, decoder_heads, decoder_depth) in _PUBLISHED_VIT.items():
        yield ViTConfig(
            name=f"vit_mae_{size}_published_patch16_224",
            embed_dim=width,
            num_heads=heads,
            depth=depth,
            decoder_embed_dim=decoder_width,
            decoder_num_heads=decoder_heads,
            decoder_depth=decoder_depth,
        )


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(_presets())


def list_bundled() -> list[str]:
    """Names of the trained models that come with the library, in half precision; see `training.md` in each folder."""
    return sorted(folder.name for folder in _BUNDLED.iterdir() if (folder / "config.json").is_file())


def bundled_folder(name: str) -> Path:
    """The folder of a trained model that comes with the library."""
    return _BUNDLED / name


def preset(name: str) -> ModelConfig:
    """The configuration behind a name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    presets = _presets()
    if name not in presets:
        hint = did_you_mean(name, presets, similarity=0.4)
        raise UserError(f"Unknown model {name}.{hint} `crate-mae models` lists the names.")
    return presets[name]


def create_model(name: str, **settings: Any) -> MaskedAutoencoder:
    """Build a preset with random initialisation, from torch's global generator.

    Args:
        name: one of `list_models()`.
        settings: any field of the preset's configuration (`CrateConfig` or `ViTConfig`), changed.

    Raises:
        UserError: for an unknown name or setting, or settings that do not fit together.
    """
    from crate_mae.models.autoencoder import build

    config = preset(name)
    check_settings(type(config), settings)
    return build(config.replace(**settings))
