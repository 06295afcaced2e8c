"""Weights of the official CRATE-MAE code (`model/crate_ae/crate_ae.py`), in and out.

The official file contains two things that its forward pass never reads: `decoder_embed`, a d x d linear map with bias,
and `pos_embed`, a second table of positions. Our model has neither. `from_official` keeps the tensors of the first
aside on the model, in `official_unused`, so that `to_official` gives back the same file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError, and_more
from crate_mae.models.autoencoder import MaskedAutoencoder, build, build_without_memory
from crate_mae.models.config import CrateConfig, ModelConfig, config_from_dict
from crate_mae.models.tensors import misfits, read_tensors, refuse_other_types, without_prefixes

# Official name -> ours, as regular expressions; $ is a layer's number.
_NAMES = {
    "cls_token": "encoder.cls_token",
    "mask_token": "mask_token",
    "decoder_pos_embed": "encoder.pos_embed",  # the table that the official encoder adds
    "patch_embed.proj.weight": "encoder.patch_embed.proj.weight",
    "patch_embed.proj.bias": "encoder.patch_embed.proj.bias",
    "blocks.$.layers.0.0.norm.weight": "encoder.blocks.$.norm1.weight",
    "blocks.$.layers.0.0.norm.bias": "encoder.blocks.$.norm1.bias",
    "blocks.$.layers.0.0.fn.qkv.weight": "encoder.blocks.$.attn.subspaces.weight",
    "blocks.$.layers.0.0.fn.to_out.0.weight": "encoder.blocks.$.attn.proj.weight",
    "blocks.$.layers.0.0.fn.to_out.0.bias": "encoder.blocks.$.attn.proj.bias",
    "blocks.$.layers.0.1.norm.weight": "encoder.blocks.$.norm2.weight",
    "blocks.$.layers.0.1.norm.bias": "encoder.blocks.$.norm2.bias",
    "blocks.$.layers.0.1.fn.weight": "encoder.blocks.$.ista.dictionary",
    "norm.weight": "encoder.norm.weight",
    "norm.bias": "encoder.norm.bias",
    "decoder_blocks.$.layers.0.0.norm.weight": "decoder.blocks.$.norm1.weight",
    "decoder_blocks.$.layers.0.0.norm.bias": "decoder.blocks.$.norm1.bias",
    "decoder_blocks.$.layers.0.0.fn.weight": "decoder.blocks.$.dictionary.weight",
    "decoder_blocks.$.layers.0.1.norm.weight": "decoder.blocks.$.norm2.weight",
    "decoder_blocks.$.layers.0.1.norm.bias": "decoder.blocks.$.norm2.bias",
    "decoder_blocks.$.layers.0.1.fn.qkv.weight": "decoder.blocks.$.attn.subspaces.weight",
    "decoder_blocks.$.layers.0.1.fn.to_out.0.weight": "decoder.blocks.$.attn.proj.weight",
    "decoder_blocks.$.layers.0.1.fn.to_out.0.bias": "decoder.blocks.$.attn.proj.bias",
    "decoder_norm.weight": "decoder.norm.weight",
    "decoder_norm.bias": "decoder.norm.bias",
    "decoder_pred.weight": "decoder.pred.weight",
    "decoder_pred.bias": "decoder.pred.bias",
}
_OURS = {ours: official for official, ours in _NAMES.items()}
# Settings that the official classes have no arguments for, or that are not in the weights.
OFFICIAL_SETTINGS = {
    "layer": "published",
    "step_size": 0.1,
    "threshold": 0.5,
    "output_projection": "free",
    "ista_skip": False,
    "overcomplete": 1,
    "mask_tokens": "encoder",
}
# Heads by width, of the four published models: the tensors do not contain them.
PUBLISHED_HEADS = {384: 6, 576: 12, 768: 12, 1024: 16}
_DEAD = ("decoder_embed.weight", "decoder_embed.bias")


def from_official(
    state_dict_or_path: Mapping[str, Tensor] | str | Path,
    *,
    num_heads: int,
    image_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> MaskedAutoencoder:
    """Build the model that an official CRATE-MAE state dict belongs to, with its weights.

    Args:
        state_dict_or_path: the state dict, or a `.safetensors`, `.pth` or `.pt` file of one. Wrappers ("model",
            "state_dict") and prefixes ("module.", "model.") are taken off. Pickles are opened with `weights_only=True`.
        num_heads: heads of the encoder and decoder, which the tensors do not contain: 6 for tiny, 12 for small and
            base, 16 for large.
        image_size: pixels the model was made for; None takes a square that fits the table of positions.
        settings: other `CrateConfig` settings, such as `norm_pix_loss` or `threshold`.

    Raises:
        UserError: for a file that is not an official CRATE-MAE, naming what is missing, unknown or of the wrong shape.
    """
    tensors, where = _official_tensors(state_dict_or_path)
    refuse_other_types(tensors, where)
    config = _infer_config(tensors, where, num_heads, image_size, settings)
    unused = {name: tensors.pop(name) for name in (*_DEAD, "pos_embed") if name in tensors}
    wanted = {_rename(name, _OURS): value for name, value in build_without_memory(config).state_dict().items()}
    if problems := misfits(tensors, wanted):
        raise UserError(f"{where} does not fit an official CRATE-MAE: {problems}.")
    model = build(config)
    model.load_state_dict({_rename(name, _NAMES): value for name, value in tensors.items()})
    model.official_unused = {name: unused[name].clone() for name in _DEAD if name in unused}
    return model


def to_official(model: MaskedAutoencoder) -> dict[str, Float[Tensor, "..."]]:
    """The state dict of the official code's class, which loads there strictly and computes the same function.

    The layer that the official forward pass never calls is that of the file the model came from, or the identity.

    Raises:
        UserError: for a model with settings that the official code does not have.
    """
    c = model.config
    official = c.replace(**OFFICIAL_SETTINGS) if isinstance(c, CrateConfig) else None
    one_shape = (c.embed_dim, c.num_heads) == (c.decoder_embed_dim, c.decoder_num_heads)
    if c != official or not one_shape:
        settings = ", ".join(f"{key}={value!r}" for key, value in OFFICIAL_SETTINGS.items())
        raise UserError(
            f"{c.name} has no official form: that needs CRATE layers with {settings}, and the same width and heads on "
            "both sides."
        )
    tensors = {_rename(name, _OURS): value.detach().clone() for name, value in model.state_dict().items()}
    tensors["pos_embed"] = tensors["decoder_pos_embed"].clone()
    dead = dict(zip(_DEAD, (torch.eye(c.embed_dim), torch.zeros(c.embed_dim)), strict=True))
    return tensors | dead | model.official_unused


def _official_tensors(source: Mapping[str, Tensor] | str | Path) -> tuple[dict[str, Tensor], str]:
    if isinstance(source, str | Path):
        tensors, where = read_tensors(Path(source)), str(source)
    else:
        tensors, where = dict(source), "The state dict"
    return without_prefixes(tensors)[0], where


def _infer_config(
    tensors: dict[str, Tensor],
    where: str,
    num_heads: int,
    image_size: int | tuple[int, int] | None,
    settings: dict[str, Any],
) -> ModelConfig:
    patch, positions = tensors.get("patch_embed.proj.weight"), tensors.get("decoder_pos_embed")
    if patch is None or positions is None or "blocks.0.layers.0.0.fn.qkv.weight" not in tensors:
        raise UserError(
            f"{where} is not an official CRATE-MAE: it lacks patch_embed, decoder_pos_embed or blocks.0.layers.\n"
            f"It holds {and_more(sorted(tensors), 4)}."
        )
    if patch.ndim != 4 or positions.ndim != 3 or positions.shape[2] != patch.shape[0]:
        raise UserError(
            f"{where} is not an official CRATE-MAE: patch_embed.proj.weight is {tuple(patch.shape)}, and "
            f"decoder_pos_embed {tuple(positions.shape)}."
        )
    width, channels, patch_size, _ = patch.shape
    if image_size is None:
        side = round((positions.shape[1] - 1) ** 0.5)
        if side * side != positions.shape[1] - 1:
            raise UserError(f"{where} was made for {positions.shape[1] - 1} patches, not a square: give image_size.")
        image_size = side * patch_size
    return config_from_dict(
        {
            "architecture": "crate",
            "image_size": image_size,
            "patch_size": patch_size,
            "in_chans": channels,
            "embed_dim": width,
            "depth": _depth(tensors, "blocks"),
            "num_heads": num_heads,
            "decoder_depth": _depth(tensors, "decoder_blocks"),
            **settings,
        }
    )


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})


def _rename(name: str, names: dict[str, str]) -> str:
    numbers = re.findall(r"(?<=blocks\.)\d+", name)
    renamed = names.get(re.sub(r"(?<=blocks\.)\d+", "$", name), name)
    return renamed.replace("$", numbers[0]) if numbers else renamed
