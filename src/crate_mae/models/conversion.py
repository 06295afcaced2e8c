"""Files of weights from elsewhere, recognised by the names and shapes of their tensors, as folders of this library.

Besides CRATE-MAE itself (`models.official`), these are the encoders of the official CRATE classifiers
(`model/crate.py`), the supervised models of the first CRATE paper. Their layers are those of CRATE-MAE's encoder, with
lambda = 0.1. Different are the patch embedding, which normalises the pixels of every patch and then its token
(`encoder.NormedPatchEmbed`), positions that were learned, and the final norm's epsilon. timm builds such an encoder
(`patch_norm=True`); a masked autoencoder of this library has none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError, and_more
from crate_mae.models.config import CrateConfig
from crate_mae.models.official import PUBLISHED_HEADS, from_official
from crate_mae.models.tensors import misfits, read_tensors, refuse_broken, refuse_other_types, without_prefixes
from crate_mae.models.timm_models import any_size_encoder
from crate_mae.models.weights import load, save, write_timm_folder


@dataclass(frozen=True)
class Conversion:
    """A file that was recognised, and is not written yet.

    Attributes:
        found: a description of it.
        notes: what was removed, assumed or left out, and why.
        write: fills an empty folder.
    """

    found: str
    notes: list[str]
    write: Callable[[Path], None]


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
    if is_classifier(tensors):
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
        config = classifier_config(tensors, heads, **({"name": path.stem} | dict(settings)))
        found, left = encoder_of_classifier(tensors, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = any_size_encoder(config, patch_norm=True).state_dict()
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
    """The configuration of an official classifier, from its tensors; it has no decoder, and none is built.

    Args:
        tensors: the state dict.
        num_heads: not in the tensors.
        settings: others of a `CrateConfig`; `in_chans` is 3 unless given.

    Raises:
        UserError: for shapes that do not belong to a square image in square patches.
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
    """The encoder's tensors by our names, and the official names of the others: the head's.

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
