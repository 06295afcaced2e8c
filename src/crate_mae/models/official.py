"""Weights of the official code, in and out, and files of weights that are recognised by the names of their tensors.

The official CRATE-MAE (`model/crate_ae/crate_ae.py`) has two things that its forward pass never reads: `decoder_embed`,
a d x d linear map with bias, and `pos_embed`, a second table of positions. Our model has neither. `from_official` keeps
the tensors of the first aside on the model, in `official_unused`, so that `to_official` gives back the same file.

The official CRATE classifiers (`model/crate.py`) are the supervised models of the first CRATE paper. The layers of
their encoders are those of CRATE-MAE's, with lambda = 0.1. Different are the patch embedding, which normalises the
pixels of every patch and then its token (`encoder.NormedPatchEmbed`), positions that were learned, and the final norm's
epsilon. timm builds such an encoder (`patch_norm=True`); a masked autoencoder of this library has none.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError, and_more
from crate_mae.models.autoencoder import MaskedAutoencoder, build, build_without_memory
from crate_mae.models.config import CrateConfig, ModelConfig, config_from_dict
from crate_mae.models.devices import without_memory
from crate_mae.models.encoder import build_encoder
from crate_mae.models.tensors import (
    misfits,
    read_tensors,
    refuse_broken,
    refuse_other_numbers,
    refuse_other_types,
    without_prefixes,
)
from crate_mae.models.timm_models import write_timm_folder
from crate_mae.models.weights import load, save


def _with_weights_and_biases(names: dict[str, str], modules: dict[str, str]) -> dict[str, str]:
    """Names of tensors, and those of the weight and the bias of modules, from official ones to ours."""
    kinds = ("weight", "bias")
    return names | {f"{official}.{kind}": f"{ours}.{kind}" for official, ours in modules.items() for kind in kinds}


# Official name -> ours; $ is a layer's number.
_NAMES = _with_weights_and_biases(
    {
        "cls_token": "encoder.cls_token",
        "mask_token": "mask_token",
        "decoder_pos_embed": "encoder.pos_embed",  # the table that the official encoder adds
        "blocks.$.layers.0.0.fn.qkv.weight": "encoder.blocks.$.attn.subspaces.weight",
        "blocks.$.layers.0.1.fn.weight": "encoder.blocks.$.ista.dictionary",
        "decoder_blocks.$.layers.0.0.fn.weight": "decoder.blocks.$.dictionary.weight",
        "decoder_blocks.$.layers.0.1.fn.qkv.weight": "decoder.blocks.$.attn.subspaces.weight",
    },
    {
        "patch_embed.proj": "encoder.patch_embed.proj",
        "blocks.$.layers.0.0.norm": "encoder.blocks.$.norm1",
        "blocks.$.layers.0.0.fn.to_out.0": "encoder.blocks.$.attn.proj",
        "blocks.$.layers.0.1.norm": "encoder.blocks.$.norm2",
        "norm": "encoder.norm",
        "decoder_blocks.$.layers.0.0.norm": "decoder.blocks.$.norm1",
        "decoder_blocks.$.layers.0.1.norm": "decoder.blocks.$.norm2",
        "decoder_blocks.$.layers.0.1.fn.to_out.0": "decoder.blocks.$.attn.proj",
        "decoder_norm": "decoder.norm",
        "decoder_pred": "decoder.pred",
    },
)
_OURS = {ours: official for official, ours in _NAMES.items()}
_CLASSIFIER_NAMES = _with_weights_and_biases(
    {
        "cls_token": "cls_token",
        "pos_embedding": "pos_embed",
        "transformer.layers.$.0.fn.qkv.weight": "blocks.$.attn.subspaces.weight",
        "transformer.layers.$.1.fn.weight": "blocks.$.ista.dictionary",
    },
    {
        "to_patch_embedding.1": "patch_embed.pixel_norm",
        "to_patch_embedding.2": "patch_embed.proj",
        "to_patch_embedding.3": "patch_embed.norm",
        "transformer.layers.$.0.norm": "blocks.$.norm1",
        "transformer.layers.$.0.fn.to_out.0": "blocks.$.attn.proj",
        "transformer.layers.$.1.norm": "blocks.$.norm2",
        "mlp_head.0": "norm",
    },
)
_CLASSIFIER_HEAD = ("mlp_head.1.weight", "mlp_head.1.bias")
_CLASSIFIER_THRESHOLD = 0.1
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
    if isinstance(state_dict_or_path, str | Path):
        tensors, where = read_tensors(Path(state_dict_or_path)), str(state_dict_or_path)
    else:
        tensors, where = dict(state_dict_or_path), "The state dict"
    tensors = without_prefixes(tensors)[0]
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
        UserError: for a model with settings that the official code does not have, or with layers that were changed.
    """
    refuse_other_numbers(model)
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
    """The other name of a tensor; its own if there is none."""
    number = re.search(r"(?<=blocks\.)\d+|(?<=transformer\.layers\.)\d+", name)
    if number is None:
        return names.get(name, name)
    pattern = f"{name[: number.start()]}${name[number.end() :]}"
    return names.get(pattern, pattern).replace("$", number[0])


@dataclass(frozen=True)
class Conversion:
    """A file that was recognised, and is not written yet."""

    found: str  # a description of it
    notes: list[str]  # what was removed, assumed or left out, and why
    write: Callable[[Path], None]  # fills an empty folder


def understand(path: Path, num_heads: int | None = None, **settings: Any) -> Conversion:
    """Find out what a file or folder of weights is, and how to write it as a folder of this library.

    Args:
        path: a file of tensors of the official code, or a folder of this library or of transformers.
        num_heads: not in official files; by default that of the published model of the same width.
        settings: others that are not in the files, such as `image_size`, `threshold` or `norm_pix_loss`.

    Raises:
        UserError: for a file that is damaged, unknown or does not fit.
    """
    if path.is_dir():
        if num_heads is not None:
            raise UserError(f"{path} is a folder of a model, which has its number of heads: leave --num-heads out.")
        model = load(path, **settings)
        count = sum(p.numel() for p in model.parameters())
        found = f"a {type(model).__name__} of this library, {model.config.name}, {count / 1e6:.2f} M parameters"
        return Conversion(found, [], lambda folder: save(model, folder))
    tensors, prefixes = without_prefixes(read_tensors(path))
    notes = [f"Removed from all names: the prefix {''.join(prefixes)}"] if prefixes else []
    refuse_other_types(tensors, path)
    refuse_broken(tensors, path)
    if {"to_patch_embedding.2.weight", "pos_embedding", "transformer.layers.0.1.fn.weight"} <= set(tensors):
        return _classifier(path, tensors, notes, num_heads, settings)
    if "blocks.0.layers.0.0.fn.qkv.weight" in tensors:
        return _autoencoder(path, tensors, notes, num_heads, settings)
    if any(name.startswith("encoder.") for name in tensors):
        raise UserError(
            f"{path} has this library's own names, and its config.json is missing: name the folder that holds both."
        )
    raise UserError(
        f"{path} holds no CRATE-MAE, official or ours, and no official CRATE classifier. Its first tensors are "
        f"{and_more(sorted(tensors), 4)}."
    )


def _autoencoder(
    path: Path, tensors: dict[str, Tensor], notes: list[str], num_heads: int | None, settings: dict[str, Any]
) -> Conversion:
    width = _size(path, tensors, "blocks.0.layers.0.0.fn.qkv.weight", 2)[1]
    heads = _heads(path, width, num_heads, notes)
    options: dict[str, Any] = {"name": path.stem} | settings
    model = from_official(tensors, num_heads=heads, **options)
    c: Any = model.config
    if model.official_unused:
        count = sum(value.numel() for value in model.official_unused.values())
        notes.append(f"Left out: decoder_embed, {count:,} numbers of a layer that the official code never calls.")
    if "pos_embed" in tensors:
        notes.append(
            f"Left out: pos_embed, {tensors['pos_embed'].numel():,} numbers of a table that the official code never "
            "reads. Its encoder adds decoder_pos_embed, which is kept."
        )
    notes.append(f"Assumed, since the file does not contain them: step size {c.step_size}, threshold {c.threshold}.")
    notes.append(f"norm_pix_loss is {str(c.norm_pix_loss).lower()}: it decides only how predictions become pixels.")
    found = (
        f"an official CRATE-MAE: width {c.embed_dim}, {c.depth} + {c.decoder_depth} layers, patches of {c.patch_size}, "
        f"images of {c.image_size[0]} x {c.image_size[1]}"
    )
    return Conversion(found, notes, lambda folder: save(model, folder))


def _classifier(
    path: Path, tensors: dict[str, Tensor], notes: list[str], num_heads: int | None, settings: Mapping[str, Any]
) -> Conversion:
    width = _size(path, tensors, "to_patch_embedding.2.weight", 2)[0]
    positions = _size(path, tensors, "pos_embedding", 3)
    if positions[1] < 2 or positions[2] != width:
        raise UserError(f"{path} does not fit an official CRATE classifier: its positions are {positions}.")
    heads = _heads(path, width, num_heads, notes)
    try:
        config = _classifier_config(tensors, heads, **({"name": path.stem} | dict(settings)))
        found, left = _encoder_of_classifier(tensors, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    with without_memory():
        wanted = build_encoder(config, patch_norm=True).state_dict()
    if problems := misfits(found, wanted):
        raise UserError(f"{path} does not fit an official CRATE classifier: {problems}.")
    if left:
        classes = _size(path, tensors, left[0], tensors[left[0]].ndim or 1)[0]
        notes.append(f"Left out: mlp_head.1, the map to {classes} classes. `crate-mae finetune` makes a new one.")
    notes.append(
        f"Assumed, since the file does not contain them: step size {config.step_size}, threshold {config.threshold}."
    )
    notes.append("Written in timm's layout, as an encoder alone: it has no decoder, and its patches are normalised.")
    text = (
        f"an official CRATE classifier: width {config.embed_dim}, {config.depth} layers, patches of "
        f"{config.patch_size}, images of {config.image_size[0]} x {config.image_size[1]}"
    )
    return Conversion(text, notes, lambda folder: write_timm_folder(config, found, folder, patch_norm=True))


def _size(path: Path, tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if tensors[name].ndim != dimensions:
        raise UserError(f"{path} holds {name} of {tensors[name].ndim} dimensions, not {dimensions}.")
    return tuple(tensors[name].shape)


def _heads(path: Path, width: int, num_heads: int | None, notes: list[str]) -> int:
    if num_heads is not None:
        return num_heads
    if width not in PUBLISHED_HEADS:
        raise UserError(
            f"{path} has width {width}, as no published model, and the file does not contain the number of heads.\n"
            "Set it: --num-heads"
        )
    notes.append(f"Assumed: {PUBLISHED_HEADS[width]} heads, as the published model of width {width} has.")
    return PUBLISHED_HEADS[width]


def _classifier_config(tensors: Mapping[str, Tensor], num_heads: int, **settings: Any) -> CrateConfig:
    """The configuration of an official classifier, from its tensors; it has no decoder, and none is built."""
    width, pixels = tensors["to_patch_embedding.2.weight"].shape
    channels = int(settings.pop("in_chans", 3))
    patch = math.isqrt(pixels // channels)
    side = math.isqrt(tensors["pos_embedding"].shape[1] - 1)
    if patch * patch * channels != pixels or side * side != tensors["pos_embedding"].shape[1] - 1:
        raise UserError(
            f"{pixels} numbers a patch and {tensors['pos_embedding'].shape[1] - 1} patches do not make a square image "
            f"of {channels} channels in square patches."
        )
    depth = len({name.split(".")[2] for name in tensors if name.startswith("transformer.layers.")})
    shape: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": num_heads, "patch_size": patch}
    images: dict[str, Any] = {"image_size": (side * patch, side * patch), "in_chans": channels}
    return CrateConfig(**({"threshold": _CLASSIFIER_THRESHOLD, "decoder_depth": 1} | shape | images | settings))


def _encoder_of_classifier(
    tensors: Mapping[str, Tensor], config: CrateConfig
) -> tuple[dict[str, Float[Tensor, "..."]], list[str]]:
    """The encoder's tensors by our names, and the official names of the others: the head's."""
    ours = {name: _rename(name, _CLASSIFIER_NAMES) for name in tensors}
    left = [name for name in tensors if ours[name] == name != "cls_token"]  # which is the same in both
    if unknown := [name for name in left if name not in _CLASSIFIER_HEAD]:
        raise UserError(f"It does not fit an official CRATE classifier: {', '.join(unknown[:3])} is unknown.")
    found = {ours[name]: value for name, value in tensors.items() if name not in left}
    kernel = found["patch_embed.proj.weight"]
    sides = (config.patch_size, config.patch_size, config.in_chans)
    # The linear map of flattened patches is a convolution.
    found["patch_embed.proj.weight"] = kernel.unflatten(1, sides).permute(0, 3, 1, 2).contiguous()
    return found, left
