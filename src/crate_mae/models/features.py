"""Features of whole images: which tokens of which layer, made into one vector an image, for any timm backbone.

`pool` is tokens to features, `encode_layers` a batch to features, and `apply_to_images` applies either, or any function
of a batch, to whatever a Python program holds: paths, Pillow images, arrays, tensors.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from crate_mae.data.base import read_file
from crate_mae.data.decode import UnreadableImage
from crate_mae.data.transforms import Preparation, evaluation_transform
from crate_mae.data.wrapped import DatasetSource
from crate_mae.errors import UserError
from crate_mae.models.config import DEFAULT_HEAD_POOLING, Config, Pooling

OneImage = str | Path | Image.Image | np.ndarray | Tensor

# The default of every command and method, chosen over 21 models: results/cifar10_ablations.
DEFAULT_POOLING: Pooling = DEFAULT_HEAD_POOLING
DEFAULT_LAYER = -1
_TEMPERATURE = 0.07  # of these votes, as in DINO
_VOTERS_AT_ONCE = 1024  # images whose similarities to all training images are in memory


def pool(
    tokens: Float[Tensor, "b m d"], num_prefix_tokens: int, pooling: Pooling = DEFAULT_POOLING
) -> Float[Tensor, "b f"] | Float[Tensor, "b n d"]:
    """Make the tokens of each image into its features.

    Args:
        tokens: prefix tokens (the class token first), then n patches.
        num_prefix_tokens: how many tokens come before the patches.
        pooling: "cls" is the class token (f = d), "mean" the mean over patches (f = d), "cls+mean" both
            concatenated (f = 2 d), and "tokens" all patches, unpooled.

    Raises:
        UserError: for an unknown pooling, or one with a class token where there are no prefix tokens.
    """
    if pooling not in get_args(Pooling):
        raise UserError(f'pooling is "{pooling}", but must be one of {", ".join(get_args(Pooling))}.')
    if "cls" in pooling and num_prefix_tokens == 0:
        raise _no_class_token(pooling)
    patches = tokens[:, num_prefix_tokens:]
    if pooling == "tokens":
        return patches
    parts = {"cls": tokens[:, 0], "mean": patches.mean(dim=1)}
    return torch.cat([parts[name] for name in pooling.split("+")], dim=1)


def encode(
    encoder: nn.Module,
    images: Float[Tensor, "b c hh ww"],
    layer: int = DEFAULT_LAYER,
    pooling: Pooling | None = None,
) -> Float[Tensor, "b f"] | Float[Tensor, "b n d"]:
    """Features of normalised images from one layer of a timm backbone; see `encode_layers`."""
    return encode_layers(encoder, images, [layer], pooling)[0]


def encode_layers(
    encoder: nn.Module,
    images: Float[Tensor, "b c hh ww"],
    layers: Sequence[int],
    pooling: Pooling | None = None,
) -> list[Float[Tensor, "b f"] | Float[Tensor, "b n d"]]:
    """Features of normalised images from several layers of a timm backbone, in one pass.

    The last layer is `forward_features`. The others are `forward_intermediates(norm=True)`: in a Vision Transformer
    the final norm is then applied to every layer, as it is to the last, so that layers can be compared. Networks whose
    stages differ in width (ResNet, Swin) have no norm that would fit them, and give their inner stages as they are.
    Feature maps are flattened to tokens. Layers are numbered from 0, or by negative numbers from the end; the pooling
    (see `pool`) is by default `default_pooling`.

    Raises:
        UserError: for a layer that does not exist, or a class token that does not.
    """
    pooling = pooling or default_pooling(encoder)
    check_pooling(encoder, pooling)
    last = depth(encoder) - 1
    numbers = [layer_number(encoder, layer) for layer in layers]
    inner = sorted(set(numbers) - {last})
    found = _intermediates(encoder, images, inner, with_last=last in numbers) if inner else {}
    if not inner:
        forward: Any = encoder.forward_features  # to a type checker, what a module has is tensors and modules
        found[last] = _as_tokens(encoder, forward(images))
    prefix = getattr(encoder, "num_prefix_tokens", 0)
    return [pool(found[number], prefix, pooling) for number in numbers]


def depth(encoder: nn.Module) -> int:
    """How many layers (of a Vision Transformer) or stages (of others) a timm backbone has."""
    info: Any = getattr(encoder, "feature_info", None)
    return len(info) if info is not None else 1


def layer_number(encoder: nn.Module, layer: int) -> int:
    """The number of a layer from 0.

    Raises:
        UserError: if there is no such layer.
    """
    layers = depth(encoder)
    if not -layers <= layer < layers:
        raise UserError(
            f"There is no layer {layer}: this encoder has {layers} layers, 0 to {layers - 1}, "
            f"or -1 to -{layers} from the end."
        )
    return layer % layers


def has_class_token(encoder: nn.Module) -> bool:
    """Whether the first token is a class token; register tokens do not count."""
    return getattr(encoder, "num_prefix_tokens", 0) > 0 and getattr(encoder, "cls_token", None) is not None


def default_pooling(encoder: nn.Module) -> Pooling:
    """`DEFAULT_POOLING`, or the mean of patches for a network without a class token."""
    return DEFAULT_POOLING if has_class_token(encoder) else "mean"


def check_pooling(encoder: nn.Module, pooling: Pooling) -> None:
    """Raise a `UserError` for a pooling that this encoder cannot have."""
    if "cls" in pooling and not has_class_token(encoder):
        raise _no_class_token(pooling)


def transform_of(config: Config) -> Preparation:
    """The preparation of an image for a model, without randomness."""
    return evaluation_transform(config.image_size, config.in_chans, config.mean, config.std)


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Have a module in `eval()`, without gradients or automatic mixed precision; afterwards it is as it was."""
    training = [module for module in encoder.modules() if module.training]
    for module in training:  # `eval()` may be overridden, to keep parts as they are
        module.training = False
    device = next((parameter.device.type for parameter in encoder.parameters()), "cpu")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # of numbers that the model or a measure makes
    try:
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for module in training:
            module.training = True


def apply_to_images(
    function: Callable[[Float[Tensor, "b c hh ww"]], Float[Tensor, "b ..."]],
    module: nn.Module,
    transform: Preparation,
    images: OneImage | Sequence[OneImage],
    batch_size: int,
) -> Float[Tensor, "b ..."]:
    """What a function of batches gives for images in memory or in files, in float32 on the CPU.

    The function computes with `module`, which is in `eval()` meanwhile, and has the device and the precision that
    batches are moved to; `transform` prepares one image for it. For the images see `MaskedAutoencoder.embed`.

    Raises:
        UserError: for no images, an image that cannot be read (named), or an item that is not an image.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    items = _items(images)
    source = DatasetSource(_Opened(items), "images")
    parameter = next(module.parameters())
    found: list[Tensor] = []
    with evaluating(module):
        for start in range(0, len(items), batch_size):
            numbers = range(start, min(start + batch_size, len(items)))
            batch = torch.stack([_prepared(source, transform, items, i) for i in numbers])
            found.append(function(batch.to(parameter.device, parameter.dtype)).float().cpu())
    # Joined outside of inference mode, so that the result may be trained on.
    return torch.cat(found)


class _Opened:
    """Items, with paths replaced by the contents of their files."""

    def __init__(self, items: list[OneImage]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int, /) -> Any:
        item = self._items[index]
        return read_file(Path(item), str(item)) if isinstance(item, (str, Path)) else item


def _items(images: OneImage | Sequence[OneImage]) -> list[OneImage]:
    """A list, also of one image, or of a tensor or array that holds several."""
    items: list[OneImage]
    if isinstance(images, (Tensor, np.ndarray)):
        items = [*images] if images.ndim == 4 else [images]
    elif isinstance(images, (str, Path, Image.Image)):
        items = [images]
    else:
        items = list(images)
    if not items:
        raise UserError("There are no images to embed: the list is empty.")
    for item in items:
        if isinstance(item, (str, Path)) and os.path.isdir(item):  # noqa: PTH112  # Path's raises for a long name
            raise UserError(f'{item} is a folder. For all its images: crate_mae.embed(model, "{item}", out=...).')
    return items


def _prepared(source: DatasetSource, transform: Preparation, items: list[OneImage], i: int) -> Tensor:
    try:
        return transform(source.read(i))
    except UnreadableImage as error:
        where = items[i] if isinstance(items[i], (str, Path)) else error.location
        raise UserError(f"{where} cannot be read: {error.reason}.") from error


def _intermediates(encoder: nn.Module, images: Tensor, layers: list[int], *, with_last: bool) -> dict[int, Tensor]:
    """Tokens of the inner layers and, if wanted, of the last one."""
    options: dict[str, Any] = {"indices": layers, "norm": True, "intermediates_only": not with_last}
    method: Any = getattr(encoder, "forward_intermediates", None)
    if method is None:
        raise UserError(f"A {type(encoder).__name__} cannot give its inner layers: take layer -1.")
    known = inspect.signature(method).parameters
    has_tokens = "return_prefix_tokens" in known
    if not has_tokens and getattr(encoder, "num_prefix_tokens", 0):
        raise UserError(f"A {type(encoder).__name__} keeps its class token to itself in inner layers: take layer -1.")
    options |= {"return_prefix_tokens": True, "output_fmt": "NLC"} if has_tokens else {"output_fmt": "NCHW"}
    if "stop_early" in known:
        options["stop_early"] = not with_last
    try:
        outputs = method(images, **options)
    except AssertionError as error:  # timm's way to refuse
        raise UserError(f"This network cannot give its inner layers ({error}): take layer -1.") from error
    final, outputs = outputs if with_last else (None, outputs)
    found = {layer: _join(output) for layer, output in zip(layers, outputs, strict=True)}
    if final is not None:
        found[depth(encoder) - 1] = _as_tokens(encoder, final)
    return found


def _join(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """(patches, prefix tokens) as one sequence; a feature map b d gh gw as tokens."""
    if isinstance(output, tuple):
        return torch.cat([output[1], output[0]], dim=1)
    return output.flatten(2).mT if output.ndim == 4 else output


def _as_tokens(encoder: nn.Module, output: Tensor) -> Tensor:
    """What `forward_features` gives, as tokens b m d."""
    if output.ndim == 4:
        return output.flatten(1, 2) if getattr(encoder, "output_fmt", "NCHW") == "NHWC" else output.flatten(2).mT
    return output[:, None] if output.ndim == 2 else output


def _no_class_token(pooling: str) -> UserError:
    return UserError(f'pooling is "{pooling}", but this network has no class token: use "mean" or "tokens".')


def neighbour_votes(
    train: Float[Tensor, "n f"], labels: Int[Tensor, "n"], val: Float[Tensor, "k f"], classes: int, neighbours: int
) -> Float[Tensor, "k c"]:
    """The votes for each class: the sum of exp(cosine similarity / 0.07) over its images among the nearest ones.

    This is the vote of instance discrimination (Wu et al. 2018) and DINO. Features should be standardised: cosines
    depend on where the origin is.

    Args:
        train: features of training images.
        labels: their classes, from 0.
        val: features of images to classify.
        classes: how many there are.
        neighbours: how many of the most similar training images vote.
    """
    train, labels = F.normalize(train, dim=1), labels.to(train.device)
    votes = []
    for part in F.normalize(val, dim=1).split(_VOTERS_AT_ONCE):
        similarity, nearest = (part @ train.T).topk(neighbours, dim=1)
        votes.append(
            part.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], (similarity / _TEMPERATURE).exp())
        )
    return torch.cat(votes)


def mean_cosine(features: Float[Tensor, "n f"]) -> float:
    r"""Mean cosine of all pairs of different rows: $(\|\sum_i u_i\|^2 - n) / (n (n - 1))$ of unit vectors $u_i$.

    Near 1, features point almost the same way, and their common part hides what tells images apart; 0 for one row.
    """
    if len(features) < 2:
        return 0.0
    units = F.normalize(features.cpu().double(), dim=1)
    count = len(units)
    return float((units.sum(dim=0).square().sum() - count) / (count * (count - 1)))
