"""Single atoms of a sparse code: what activates them, where, and what the decoder draws when one of them is raised.

An atom is one coordinate of a layer's code. On whole images, the patches that activate it most say what it stands for.
On masked images, it is raised by one standard deviation of its own activation in all visible patches, and the change of
the hidden pixels is what it contributes to the completion. If contributions simply added up, that change would be the
linear response, the derivative times the step; both are compared, and so are those of random directions of the code,
in which the step is as long. These directions are dense and have both signs, so they also leave the non-negative codes
that ISTA makes.
"""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from crate_mae.data.numbers import check_whole, describe_not_whole
from crate_mae.errors import UserError
from crate_mae.evaluation.reconstruction import nested_masks
from crate_mae.interpret.removals import chosen_atoms
from crate_mae.interpret.tokens import to_pictures
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.completion import predicted_patches
from crate_mae.models.config import MASK_RATIO
from crate_mae.models.features import evaluating, layer_number
from crate_mae.models.interventions import intervene, places_of
from crate_mae.models.masking import patchify, unpatchify
from crate_mae.models.tracing import trace

_STRONGEST = 6  # patches of each atom
_MASKED_PATCHES = 1024  # whose responses are measured, in all images together
_LEAST_CHANGE = 1e-4  # of pixels in [0, 1]; in smaller ones, rounding in float32 would look like a non-linear response

Reason = Literal["named", "matters", "energy", "random"]


@dataclass(frozen=True)
class Atom:
    """The numbers of one atom.

    Attributes:
        layer: number of the encoder's layer.
        index: of the atom.
        chosen: why it is shown: it was named, it matters (see `removals`), it has the most energy, or at random.
        share: of the squared length of the layer's code.
        active: share of patches in which it is not zero.
        std: standard deviation of its activation over patches, by which it is raised.
        change: of hidden pixels in [0, 1], root mean square.
        random_change: the same for the average random direction.
        cosine: of that change with the linear response; None if next to nothing changes.
        realised: by how much of the linear response the pixels change, <change, response> / ||response||^2; 1 if they
            follow it. None likewise.
        random_cosine: mean over random directions.
        random_cosine_low: the least of them.
        random_cosine_high: the largest of them.
    """

    layer: int
    index: int
    chosen: Reason
    share: float
    active: float
    std: float
    change: float
    random_change: float
    cosine: float | None
    realised: float | None
    random_cosine: float | None
    random_cosine_low: float | None
    random_cosine_high: float | None


class Gallery(NamedTuple):
    """Selected atoms of a layer, with pictures that illustrate them.

    Attributes:
        atoms: their numbers.
        pictures: the images, in [0, 1].
        strongest: for each atom (image, patch, activation), the largest first, at most one of each image.
        mean_patches: the mean of all patches, weighted by the atom's activation, less the mean without weights.
        places: mean activation in each place.
        drawn: mean change of the pixels in [0, 1] over the images in which they are hidden.
    """

    atoms: list[Atom]
    pictures: Float[np.ndarray, "b hh ww 3"]
    strongest: list[list[tuple[int, int, float]]]
    mean_patches: Float[np.ndarray, "k side side 3"]
    places: Float[np.ndarray, "k gh gw"]
    drawn: Float[np.ndarray, "k hh ww 3"]


def measure_atoms(
    net: nn.Module,
    images: Float[Tensor, "b c hh ww"],
    *,
    layer: int = -1,
    atoms: Sequence[int] | None = None,
    mattering: Collection[int] = (),
    count: int = 8,
    draws: int = 3,
    mask_ratio: float = MASK_RATIO,
    seed: int = 0,
    batch_size: int = 64,
) -> Gallery:
    """Measure atoms of one layer's code.

    Args:
        net: an autoencoder with sparse codes.
        images: normalised; the responses of the decoder are measured on the first of them, 1,024 patches in all.
        layer: of the encoder, from 0, or negative from the end.
        atoms: which; by default `count` of them: half of them those of `mattering` and then those with the most
            energy, half at random from the others.
        mattering: atoms that come first.
        count: how many, if they are not named.
        draws: random directions.
        mask_ratio: share of patches that are hidden while responses are measured.
        seed: of random atoms, random directions and masks.
        batch_size: images that are encoded at once.

    Raises:
        UserError: for a model without a decoder or without codes, a compiled or exported one, a layer or an atom that
            does not exist, or no atoms or directions.
    """
    check_whole("draws", draws)
    check_whole("count", count)
    with intervene(net, {}):  # which refuses what cannot be changed, before anything is measured
        net, number, size = with_code(net, layer)
    name = f"encoder.blocks.{number}.code"
    if wrong := [atom for atom in atoms or [] if describe_not_whole("", atom, 0, size - 1)]:
        raise no_atom(wrong[0], number, size)
    generator = torch.Generator().manual_seed(seed)
    energy = torch.stack(of_codes(net, name, images, batch_size, lambda code: code.double().square().sum((0, 1))))
    share = energy.sum(0) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    named: dict[int, Reason] = dict.fromkeys(atoms or [], "named")
    chosen = named or _chosen(share, mattering, count, generator)
    indices = list(chosen)
    values = torch.cat(of_codes(net, name, images, batch_size, lambda code: code[..., indices].float()))
    masks = nested_masks(
        min(len(images), math.ceil(_MASKED_PATCHES / net.num_patches)), net.num_patches, mask_ratio, seed
    )
    response = _Response(net, images[: len(masks)], masks, name)
    directions = torch.nn.functional.normalize(torch.randn(draws, size, generator=generator))
    controls = [(direction, response.linear(direction)) for direction in directions]
    found, drawn = [], []
    for (index, why), activation in zip(chosen.items(), values.unbind(-1), strict=True):
        atom, picture = _raised(response, number, index, why, share, activation, controls)
        found.append(atom)
        drawn.append(picture)
    c, patches = net.config, patchify(images, net.config.patch_size)
    weights = values / values.sum((0, 1)).clamp_min(torch.finfo(values.dtype).tiny)
    means = torch.einsum("bnk,bnq->kq", weights, patches - patches.mean((0, 1))) * response.scale
    return Gallery(
        atoms=found,
        pictures=to_pictures(images, c.mean, c.std),
        strongest=[_strongest(activation) for activation in values.unbind(-1)],
        mean_patches=_differences(unpatchify(means[:, None], c.patch_size, (1, 1))),
        places=values.mean(0).T.unflatten(1, net.grid_size).numpy(),
        drawn=np.concatenate(drawn),
    )


def with_code(net: nn.Module, layer: int) -> tuple[MaskedAutoencoder, int, int]:
    """The model, the number of a layer of its encoder, and how many atoms this has.

    Raises:
        UserError: for a model without a decoder or without codes, or a layer that does not exist.
    """
    if not isinstance(net, MaskedAutoencoder):
        raise UserError(f"A {type(net).__name__} has no decoder, which would draw what an atom stands for.")
    number = layer_number(net.encoder, layer)
    place = places_of(net.encoder.blocks[number]).get("code")
    if place is None or place.size is None:
        raise UserError(f"{net.config.name} has no atoms: only the layers of CRATE have sparse codes.")
    return net, number, place.size


def no_atom(atom: object, layer: int, size: int) -> UserError:
    """The error for an atom that a layer's code does not have."""
    return UserError(f"There is no atom {atom} in layer {layer}: its code has {size}, 0 to {size - 1}.")


def _chosen(
    share: Float[Tensor, "m"], mattering: Collection[int], count: int, generator: torch.Generator
) -> dict[int, Reason]:
    """Atoms, and why they are shown."""
    rank = share.clone()
    rank[list(mattering)] += 1
    indices = chosen_atoms(rank, count, generator)
    found: dict[int, Reason] = {}
    for place, index in enumerate(indices):
        is_first = place < math.ceil(count / 2)
        found[index] = "random" if not is_first else "matters" if index in mattering else "energy"
    return found


def of_codes(
    net: MaskedAutoencoder, name: str, images: Tensor, batch_size: int, function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """A function of the codes of whole images' patches, batch by batch."""
    own, prefix = next(net.parameters()), net.encoder.num_prefix_tokens
    found = []
    with evaluating(net), trace(net, [name]) as seen:
        for batch in images.split(batch_size):
            net.encoder.forward_features(batch.to(own))
            found.append(function(seen[name].pop()[:, prefix:]).cpu())
    return found


def _strongest(values: Float[Tensor, "b n"]) -> list[tuple[int, int, float]]:
    """The patches in which an atom is most active, at most one of each image: (image, patch, activation)."""
    best = values.max(1)
    order = best.values.argsort(descending=True, stable=True)[:_STRONGEST].tolist()
    return [(i, int(best.indices[i]), float(best.values[i])) for i in order if best.values[i] > 0]


class _Response:
    """How hidden pixels in [0, 1] change when a vector is added to the code of every visible patch."""

    def __init__(self, net: MaskedAutoencoder, images: Tensor, masks: Tensor, name: str) -> None:
        self.net, self.images, self.masks, self.name = net, images, masks, name
        self.is_raised = is_visible_patch(net, masks)[..., None]
        self.scale = torch.tensor(net.config.std).repeat(net.config.patch_size**2)
        self.intact = self._predicted(torch.zeros(()))

    def actual(self, step: Float[Tensor, "m"]) -> Float[Tensor, "hidden q"]:
        """The change after the whole step."""
        return ((self._predicted(step) - self.intact) * self.scale)[self.masks]

    def linear(self, step: Float[Tensor, "m"]) -> Float[Tensor, "hidden q"]:
        """The derivative in the direction of the step, times the step."""
        with warnings.catch_warnings(), forward_ad.dual_level():
            # PyTorch's forward mode compiles parts of itself at first use, which it tells others not to do.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            size = forward_ad.make_dual(torch.zeros(()), torch.ones(()))
            tangent = forward_ad.unpack_dual(self._predicted(size * step)).tangent
            assert tangent is not None, "the step is part of every prediction"
            return (tangent * self.scale)[self.masks]

    def mean_picture(self, change: Float[Tensor, "hidden q"]) -> Float[np.ndarray, "1 hh ww 3"]:
        """The mean change of each place over the images in which it is hidden."""
        whole = torch.zeros(*self.masks.shape, change.shape[-1]).masked_scatter(self.masks[..., None], change)
        mean = whole.sum(0) / self.masks.sum(0)[:, None].clamp(min=1)
        return _differences(unpatchify(mean[None], self.net.config.patch_size, self.net.grid_size))

    def _predicted(self, step: Tensor) -> Float[Tensor, "b n q"]:
        changes = {self.name: lambda code: code + (self.is_raised * step).to(code)}
        with evaluating(self.net), torch.inference_mode(False), torch.no_grad(), intervene(self.net, changes):
            return predicted_patches(self.net, self.images, self.masks)


def is_visible_patch(net: MaskedAutoencoder, masks: Bool[Tensor, "b n"]) -> Bool[Tensor, "b t"]:
    """Which of the tokens that the encoder sees in a masked pass are those of visible patches."""
    is_visible = ~masks
    if net.config.mask_tokens == "decoder":  # the encoder sees nothing else
        is_visible = torch.ones(len(masks), int(is_visible[0].sum()), dtype=torch.bool)
    prefix = torch.zeros(len(masks), net.encoder.num_prefix_tokens, dtype=torch.bool)
    return torch.cat([prefix, is_visible], 1)


def _raised(
    response: _Response,
    layer: int,
    index: int,
    chosen: Reason,
    share: Float[Tensor, "m"],
    activation: Float[Tensor, "b n"],
    controls: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Atom, Float[np.ndarray, "1 hh ww 3"]]:
    """An atom's numbers, beside random directions and their linear responses; and what is drawn when it is raised."""
    std, direction = float(activation.double().std()), torch.eye(len(share))[index]
    change = response.actual(std * direction)
    cosine, realised = _agreement(change, std * response.linear(direction))
    at_random = [(response.actual(std * each), std * linear) for each, linear in controls]
    cosines = [agreed for pair in at_random if (agreed := _agreement(*pair)[0]) is not None]
    atom = Atom(
        layer=layer,
        index=index,
        chosen=chosen,
        share=float(share[index]),
        active=float((activation > 0).float().mean()),
        std=std,
        change=_rms(change),
        random_change=fmean(_rms(each) for each, _ in at_random),
        cosine=cosine,
        realised=realised,
        random_cosine=fmean(cosines) if cosines else None,
        random_cosine_low=min(cosines, default=None),
        random_cosine_high=max(cosines, default=None),
    )
    return atom, response.mean_picture(change)


def _agreement(change: Tensor, linear: Tensor) -> tuple[float, float] | tuple[None, None]:
    """The cosine of a change with the linear response, and how much of the latter it realises."""
    change, linear = change.double(), linear.double()
    if min(_rms(change), _rms(linear)) < _LEAST_CHANGE:
        return None, None
    product = float((change * linear).sum())
    return product / float(change.norm() * linear.norm()), product / float(linear.square().sum())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _differences(pixels: Float[Tensor, "k c hh ww"]) -> Float[np.ndarray, "k hh ww 3"]:
    """Differences of pictures in colour, as `to_pictures` makes it of other channels."""
    channels = pixels.shape[1]
    return 2 * to_pictures((1 + pixels) / 2, (0.0,) * channels, (1.0,) * channels) - 1
