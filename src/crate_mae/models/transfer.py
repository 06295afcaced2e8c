"""Start a model from the weights of another: other image sizes, patch sizes, channels, and layers that only one has."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from crate_mae.errors import UserError, and_more
from crate_mae.models.config import ModelConfig

_PATCH_WEIGHT = "encoder.patch_embed.proj.weight"
_PREDICTION = ("decoder.pred.weight", "decoder.pred.bias")
_POSITIONS = ("encoder.pos_embed", "decoder.pos_embed")  # fixed tables: the new model has those of its own grid

_SMALLEST_PATCH = 2  # a patch of one pixel has no deviation that its target could be divided by


class Transfer(NamedTuple):
    """What a model has taken from another.

    Attributes:
        taken: names of the tensors that were taken, as they are or resampled.
        initialised: names of the model's tensors that keep their random initialisation.
    """

    taken: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.initialised)
        if not self.initialised:
            return "all weights"
        parts = and_more(sorted({_layer_of(name) for name in self.initialised}), 4)
        return f"{len(self.taken)} of {total} tensors; random initialisation: {parts}"


def resized_config(config: ModelConfig, image_size: tuple[int, int]) -> ModelConfig:
    """A model for images of another size, with as many patches as before where these can be whole.

    A network that has learned what 8 x 8 patches of an image are knows more about 8 x 8 patches of a larger image than
    about patches of the same number of pixels, which show less.
    """
    (height, width), (rows, columns) = image_size, config.grid_size
    patch = height // rows
    if patch >= _SMALLEST_PATCH and (patch * rows, patch * columns) == (height, width):
        return config.replace(image_size=image_size, patch_size=patch)
    return config.replace(image_size=image_size)


@torch.no_grad()
def start_from(model: nn.Module, tensors: Mapping[str, Tensor]) -> Transfer:
    """Copy the weights of another model into this one, where both have them in the same shape.

    The maps from and to patches are resampled if patches have another size: the first as in FlexiViT (Beyer et al.
    2023, `timm.layers.resample_patch_embed`), so that enlarged patches have the same tokens; the last by interpolating
    the predicted patches. Grey and colour are converted into each other: weights of the colours are added up, or
    divided among them.

    Args:
        model: an autoencoder of this library.
        tensors: the other's `state_dict`.

    Raises:
        UserError: if no matrix of the encoder's layers fits, so that there is nothing to start from.
    """
    own = {name: value for name, value in model.state_dict().items() if name not in _POSITIONS}
    channels, patch = own[_PATCH_WEIGHT].shape[1], own[_PATCH_WEIGHT].shape[-1]
    fitting: dict[str, Tensor] = {}
    for name, wanted in own.items():
        if name not in tensors:
            continue
        value = tensors[name].to(wanted.dtype)
        if name == _PATCH_WEIGHT:
            value = _resized_embedding(value, channels, patch)
        elif name in _PREDICTION:
            value = _resized_prediction(value, tensors[_PATCH_WEIGHT].shape[1], channels, patch)
        if value.shape == wanted.shape:
            fitting[name] = value
    if not any(name.startswith("encoder.blocks.") and value.ndim > 1 for name, value in fitting.items()):
        raise UserError("no matrix of its encoder layers fits this model: the width or the kind of layer differs.")
    model.load_state_dict(fitting, strict=False)
    return Transfer(tuple(fitting), tuple(name for name in own if name not in fitting))


def _resized_embedding(weight: Float[Tensor, "d c p p"], channels: int, patch: int) -> Float[Tensor, "d c2 p2 p2"]:
    if weight.shape[1] == 3 and channels == 1:
        weight = weight.sum(1, keepdim=True)
    elif weight.shape[1] == 1 and channels == 3:
        weight = weight.expand(-1, 3, -1, -1) / 3
    return resample_patch_embed(weight, [patch, patch], interpolation="bicubic", antialias=True)


def _resized_prediction(
    value: Float[Tensor, "q ..."], old_channels: int, channels: int, patch: int
) -> Float[Tensor, "q2 ..."]:
    """Rows of the last map are pixels of a patch, in the order row, column, channel."""
    side = round((len(value) / old_channels) ** 0.5)
    pixels = value.reshape(side, side, old_channels, -1).permute(2, 3, 0, 1)  # c, d or 1, p, p
    pixels = F.interpolate(pixels, size=(patch, patch), mode="bilinear", antialias=True)
    if old_channels == 3 and channels == 1:
        pixels = pixels.mean(0, keepdim=True)
    elif old_channels == 1 and channels == 3:
        pixels = pixels.expand(3, -1, -1, -1)
    return pixels.permute(2, 3, 0, 1).reshape(-1, *value.shape[1:])


def _layer_of(name: str) -> str:
    """`encoder.blocks.3` of a tensor in that layer, else the module it is in."""
    words = name.split(".")
    return ".".join(words[: 3 if words[1:2] == ["blocks"] else 2])
