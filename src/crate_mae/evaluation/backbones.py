"""One interface for everything that can be evaluated: our encoders, timm's networks, and raw pixels as a control."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from jaxtyping import Float
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from crate_mae.data import evaluation_transform
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError, did_you_mean, first_line
from crate_mae.models.autoencoder import build
from crate_mae.models.config import CONFIG_FILE, config_from_settings
from crate_mae.models.tensors import refuse_timm_misfits
from crate_mae.models.weights import (
    UNTRAINED,
    description_in,
    folder_of,
    is_encoder_of_transformers,
    is_of_timm,
    is_untrained,
    load,
    load_encoder_folder,
    model_name,
    unwrapped,
    without_untrained,
)

PIXELS = "pixels"
PIXELS_SIDE = 32  # by default
_MOST_PIXELS_SIDE = 512  # 786,432 features an image
_PATIENCE = 10.0  # seconds
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OFFLINE = (
    "Without a network connection, use timm:NAME:untrained (random initialisation), a model of your own, or `pixels`."
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen encoder, and how to prepare images for it.

    Attributes:
        encoder: a module with timm's interface; see `evaluating`.
        name: the name that the user gave.
        image_size: height and width of its input.
        in_chans: channels of its input.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].
        is_random: whether its weights are a random initialisation.
        architecture: everything besides the weights that determines the features; None if unknown, as for a module
            from Python, whose features are then not cached.
        is_borrowed: whether it is a module from Python, which stays on its device and as it is.
    """

    encoder: nn.Module
    name: str
    image_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_random: bool = False
    architecture: str | None = None
    is_borrowed: bool = False

    def transform(self) -> Preparation:
        """The preparation of an image, without randomness."""
        return evaluation_transform(self.image_size, self.in_chans, self.mean, self.std)

    def fingerprint(self) -> str | None:
        """A digest of everything that determines the features of an image; None if that is unknown."""
        if self.architecture is None:
            return None
        preparation = [self.image_size, self.in_chans, self.mean, self.std]
        digest = hashlib.sha256(json.dumps([self.architecture, timm.__version__, preparation]).encode())
        for name, value in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class RawPixels(nn.Module):
    """A control without a network: the pixels of an image are its only token."""

    def forward_features(self, images: Float[Tensor, "b c hh ww"]) -> Float[Tensor, "b 1 f"]:
        """The images, flattened."""
        return images.flatten(1)[:, None]


def open_backbone(model: Any, *, seed: int = 0) -> Backbone:
    """Open any form of MODEL for evaluation.

    | MODEL | is |
    |---|---|
    | any form that `crate_mae.load` takes | its encoder; for the name of a preset, with random initialisation |
    | a folder with an encoder alone | as written by `crate-mae export --part encoder` and `crate-mae convert` |
    | `timm:NAME` | a network of timm with its published weights, downloaded at first use |
    | any of these, then `:untrained` | the same network with random initialisation, as a control |
    | `pixels`, `pixels:SIZE` | colour pixels at 32 x 32 or another size, as a control |
    | a module from Python | one of ours, or any with timm's interface |

    Args:
        model: see above.
        seed: of a random initialisation.

    Raises:
        UserError: if there is no such model, or its weights cannot be loaded.
    """
    if isinstance(model, nn.Module):
        return replace(_from_module(unwrapped(model)), is_borrowed=True)
    name, has_suffix = without_untrained(str(model))
    if isinstance(model, str) and is_pixels(name):
        if has_suffix:
            raise UserError(f"{model}: raw pixels have no weights: leave {UNTRAINED} out.")
        return _pixels(name)
    with default_generator_seeded(seed):
        if isinstance(model, str) and name.startswith("timm:"):
            backbone = _from_timm(name, is_trained=not has_suffix)
        elif is_of_timm(described := description_in(folder := folder_of(name))):
            backbone = _from_timm_folder(folder, described, is_trained=not has_suffix)
        elif is_encoder_of_transformers(described):
            settings = described["settings"]
            net = build(config_from_settings(settings)).eval() if has_suffix else load_encoder_folder(folder, settings)
            backbone = _ours(net, str(folder))
        else:
            backbone = _ours(load(model), name)
    return replace(backbone, name=str(model), is_random=is_untrained(str(model)))


def _ours(net: Any, name: str) -> Backbone:
    """The encoder of an autoencoder, or of a classifier made from one."""
    config = net.config
    return Backbone(
        encoder=net.encoder,
        name=name,
        image_size=config.image_size,
        in_chans=config.in_chans,
        mean=config.mean,
        std=config.std,
        architecture=json.dumps(config.to_dict()),
    )


def _from_module(module: nn.Module) -> Backbone:
    name = model_name(module)
    if hasattr(module, "config") and hasattr(module, "encoder"):
        return _ours(module, name)
    if not callable(getattr(module, "forward_features", None)):
        raise UserError(
            f"A {name} has no forward_features: only models of this library and of timm can be evaluated.\n"
            "Give your network that method (images b c hh ww to tokens b n d, or to a map b d gh gw)."
        )
    return _with_timm_data(module, name, architecture=None)


def _from_timm(model: str, *, is_trained: bool) -> Backbone:
    name = model.removeprefix("timm:")
    if ":" in name:
        raise UserError(f"{model} is not a valid model: it must look like timm:NAME or timm:NAME{UNTRAINED}.")
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), "timm:{}")
        raise UserError(f"timm has no model {name}.{hint} timm.list_models() lists the names.")
    try:
        if is_trained:
            _ask_hub(name)
        encoder = timm.create_model(name, pretrained=is_trained, num_classes=0)
    except Exception as error:  # of the hub, the network or timm: no published weights
        raise UserError(f"The weights of {model} cannot be loaded: {first_line(error)}\n{_OFFLINE}") from error
    return _with_timm_data(encoder.eval(), model, architecture=model)


def _from_timm_folder(folder: Path, description: Mapping[str, Any], *, is_trained: bool) -> Backbone:
    refuse_timm_misfits(folder, description)
    try:
        encoder = timm.create_model(f"local-dir:{folder}", pretrained=is_trained, num_classes=0)
    except Exception as error:  # timm raises many kinds
        raise UserError(f"{folder} cannot be opened by timm: {first_line(error)}") from error
    return _with_timm_data(encoder.eval(), str(folder), architecture=(folder / CONFIG_FILE).read_text("utf-8"))


def _ask_hub(name: str) -> None:
    """Ask once for weights that are not on this machine, because the hub's library would retry for a minute."""
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config is not None else None
    if repository is None:
        return
    kept = [try_to_load_from_cache(repository.strip(), file) for file in _WEIGHTS]
    if not any(isinstance(path, str) for path in kept):
        HfApi().model_info(repository.strip(), timeout=_PATIENCE)


def _with_timm_data(encoder: nn.Module, name: str, *, architecture: str | None) -> Backbone:
    data: Mapping[str, Any] = resolve_model_data_config(encoder)
    channels = int(getattr(encoder, "in_chans", data["input_size"][0]))
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or data["input_size"][1:]
    # Published means have 3 channels; a network with other channels, made in Python, uses their average.
    mean, std = (
        tuple(data[key]) if len(data[key]) == channels else (sum(data[key]) / len(data[key]),) * channels
        for key in ("mean", "std")
    )
    return Backbone(
        encoder=encoder,
        name=name,
        image_size=(int(size[0]), int(size[1])),
        in_chans=channels,
        mean=mean,
        std=std,
        architecture=architecture,
    )


def is_pixels(model: str) -> bool:
    """Whether a form of MODEL names raw pixels."""
    return model.partition(":")[0] == PIXELS and not Path(model).exists()


def _pixels(model: str) -> Backbone:
    side = model.partition(":")[2] or str(PIXELS_SIDE)
    if not (side.isdecimal() and len(side) <= len(str(_MOST_PIXELS_SIDE)) and 1 <= int(side) <= _MOST_PIXELS_SIDE):
        raise UserError(
            f"{model} is not a valid model: it must look like pixels or pixels:SIZE, with a size such as 32, "
            f"{_MOST_PIXELS_SIDE} at most."
        )
    half = (0.5, 0.5, 0.5)
    size = (int(side), int(side))
    return Backbone(
        encoder=RawPixels(), name=model, image_size=size, in_chans=3, mean=half, std=half, architecture=model
    )
