"""Encoders of the official CRATE classifiers (`model/crate.py`), the supervised models of the first CRATE paper.

Their layers are those of CRATE-MAE's encoder, with lambda = 0.1. Different are the patch embedding, which normalises
the pixels of every patch and then its token (`encoder.NormedPatchEmbed`), positions that were learned, and the
final norm's epsilon. timm builds such an encoder (`patch_norm=True`); a masked autoencoder of this library has none.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.models.config import CrateConfig

THRESHOLD = 0.1
_HEAD = ("mlp_head.1.weight", "mlp_head.1.bias")
_LAYER = {
    "0.norm.weight": "norm1.weight",
    "0.norm.bias": "norm1.bias",
    "0.fn.qkv.weight": "attn.subspaces.weight",
    "0.fn.to_out.0.weight": "attn.proj.weight",
    "0.fn.to_out.0.bias": "attn.proj.bias",
    "1.norm.weight": "norm2.weight",
    "1.norm.bias": "norm2.bias",
    "1.fn.weight": "ista.dictionary",
}
_REST = {
    "cls_token": "cls_token",
    "pos_embedding": "pos_embed",
    "to_patch_embedding.1.weight": "patch_embed.pixel_norm.weight",
    "to_patch_embedding.1.bias": "patch_embed.pixel_norm.bias",
    "to_patch_embedding.2.weight": "patch_embed.proj.weight",
    "to_patch_embedding.2.bias": "patch_embed.proj.bias",
    "to_patch_embedding.3.weight": "patch_embed.norm.weight",
    "to_patch_embedding.3.bias": "patch_embed.norm.bias",
    "mlp_head.0.weight": "norm.weight",
    "mlp_head.0.bias": "norm.bias",
}


def is_classifier(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of the official classifier."""
    return {"to_patch_embedding.2.weight", "pos_embedding", "transformer.layers.0.1.fn.weight"} <= set(tensors)


def classifier_config(tensors: Mapping[str, Tensor], num_heads: int, **settings: Any) -> CrateConfig:
    """What the tensors say of an official classifier; its decoder is that of nobody, and is not built.

    Args:
        tensors: the state dict.
        num_heads: which the tensors do not tell.
        settings: others of a `CrateConfig`; `in_chans` is 3 unless given.

    Raises:
        UserError: for shapes that belong to no square image of square patches.
    """
    width, pixels = tensors["to_patch_embedding.2.weight"].shape
    channels = int(settings.pop("in_chans", 3))
    patch = math.isqrt(pixels // channels)
    side = math.isqrt(tensors["pos_embedding"].shape[1] - 1)
    if patch * patch * channels != pixels or side * side != tensors["pos_embedding"].shape[1] - 1:
        raise UserError(
            f"{pixels} numbers a patch and {tensors['pos_embedding'].shape[1] - 1} patches are no square image of "
            f"{channels} channels in square patches."
        )
    depth = len({name.split(".")[2] for name in tensors if name.startswith("transformer.layers.")})
    shape: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": num_heads, "patch_size": patch}
    images: dict[str, Any] = {"image_size": (side * patch, side * patch), "in_chans": channels}
    return CrateConfig(**({"threshold": THRESHOLD, "decoder_depth": 1} | shape | images | settings))


def encoder_of_classifier(
    tensors: Mapping[str, Tensor], config: CrateConfig
) -> tuple[dict[str, Float[Tensor, "..."]], list[str]]:
    """The encoder's tensors by our names, and the official names of those that it has no place for: the head's.

    The linear map of flattened patches becomes the convolution that it is.
    """
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for name, value in tensors.items():
        stem, _, rest = name.removeprefix("transformer.layers.").partition(".")
        if name in _REST:
            found[_REST[name]] = value
        elif name.startswith("transformer.layers.") and rest in _LAYER:
            found[f"blocks.{stem}.{_LAYER[rest]}"] = value
        else:
            left.append(name)
    if unknown := [name for name in left if name not in _HEAD]:
        raise UserError(f"It does not fit an official CRATE classifier: {', '.join(unknown[:3])} is unknown.")
    kernel = found["patch_embed.proj.weight"]
    sides = (config.patch_size, config.patch_size, config.in_chans)
    found["patch_embed.proj.weight"] = kernel.unflatten(1, sides).permute(0, 3, 1, 2).contiguous()
    return found, left
