"""`crate-mae export --format torch`: an encoder or a classifier as one file of plain PyTorch, and its weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from crate_mae.data.documents import to_json
from crate_mae.data.files import set_usual_mode
from crate_mae.deployment import plain_model
from crate_mae.errors import UserError
from crate_mae.models.classifier import Classifier
from crate_mae.models.config import CONFIG_FILE, WEIGHTS_FILE, CrateConfig, encoder_config
from crate_mae.models.layers import EncoderLayer, OvercompleteISTA
from crate_mae.models.monotone import BoundedISTA, Compression
from crate_mae.models.weights import Model
from crate_mae.theory.sparse_coding import scaled_gram

CODE_FILE = "model.py"


def write_plain(model: Model, folder: Path, part: str) -> None:
    """Write model.py, which is `deployment/plain_model.py`, and its weights and settings; `part` as in `export`.

    Raises:
        UserError: for an autoencoder with its decoder, or an encoder of other layers than CRATE's.
    """
    if part == "full" and not isinstance(model, Classifier):
        raise UserError("--format torch has no decoders: use --part encoder, or --format pt2 for the whole model.")
    config = encoder_config(model.config)
    if not isinstance(config, CrateConfig):
        raise UserError(
            f"--format torch writes CRATE's layers, and {config.name} has those of a Vision Transformer, which timm "
            "has: use --format timm."
        )
    settings, tensors = plain_form(model, config, has_head=part == "full")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    set_usual_mode(folder, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(to_json(settings) + "\n", encoding="utf-8")
    shutil.copyfile(plain_model.__file__, folder / CODE_FILE)


@torch.no_grad()
def plain_form(model: Any, config: CrateConfig, *, has_head: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors as `plain_model` takes them; the model must be in `eval()`."""
    encoder = model.encoder
    layers: list[EncoderLayer] = list(encoder.blocks)
    settings = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "depth": len(layers),
        "eps": encoder.norm.eps,
        "layer_eps": layers[0].norm1.eps,
        "ista_steps": OvercompleteISTA.STEPS if config.overcomplete > 1 else config.ista_steps,
        "ista_skip": config.ista_skip,
        "classes": model.config.classes if has_head else (),
        "pooling": model.config.pooling if has_head else "",
        "head_eps": model.norm.eps if has_head else 0.0,
    }
    tensors = {
        "patch_weight": encoder.patch_embed.proj.weight,
        "patch_bias": encoder.patch_embed.proj.bias,
        "class_token": encoder.cls_token,
        "positions": encoder.pos_embed,
        **_norm("norm", encoder.norm),
    }
    if has_head:
        tensors |= {**_norm("head_norm", model.norm), "head_weight": model.head.weight, "head_bias": model.head.bias}
    for i, layer in enumerate(layers):
        tensors |= {f"blocks.{i}.{name}": value for name, value in _of_layer(layer).items()}
    return settings, {name: value.detach().float() for name, value in tensors.items()}


def _of_layer(layer: EncoderLayer) -> dict[str, Tensor]:
    attn: Any = layer.attn
    tensors = {**_norm("norm1", layer.norm1), **_norm("norm2", layer.norm2), **_sparse_coding(layer.ista)}
    if isinstance(attn, Compression):
        u = attn.subspaces.polar_factor().mT
        return tensors | {"subspaces": u, "scale": attn.scale().flatten(), "rate": attn.rate().flatten()}
    u = attn.subspaces.weight.mT
    free = attn.proj is not None
    return tensors | {
        "subspaces": u,
        "scale": u.new_full((attn.num_heads,), (len(u) / attn.num_heads) ** -0.5),
        "proj_weight": attn.proj.weight.mT if free else u.mT,
        "proj_bias": attn.proj.bias if free else u.new_zeros(len(u)),
    }


def _sparse_coding(ista: Any) -> dict[str, Tensor]:
    """The operator eta D, or I + eta (D - D^T D) of a step from the tokens, and what else a step needs."""
    shift = ista.dictionary.new_tensor(ista.step_size * ista.threshold)
    if isinstance(ista, OvercompleteISTA):
        tensors = {
            "operator": ista.step_size * ista.dictionary,
            "gram": scaled_gram(ista.dictionary, ista.step_size),
            "readout": ista.readout.weight.mT,
        }
    elif isinstance(ista, BoundedISTA):
        operator, gram = ista.matrices()
        tensors = {"operator": operator} | ({} if gram is None else {"gram": gram})
    else:
        tensors = {"operator": ista.operator()}
    return tensors | {"shift": shift}


def _norm(name: str, norm: nn.LayerNorm) -> dict[str, Tensor]:
    return {f"{name}_weight": norm.weight, f"{name}_bias": norm.bias}
