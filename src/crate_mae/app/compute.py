"""The models of the app, and what it computes from a picture, a mask and a model, as arrays."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from crate_mae.data.dataset import default_generator_seeded
from crate_mae.errors import UserError
from crate_mae.evaluation.reconstruction import completion_quality, nested_masks
from crate_mae.interpret.atoms import is_visible_patch, no_atom, of_codes, with_code
from crate_mae.interpret.attention import attention_on_grid
from crate_mae.interpret.audit import AuditRow, audit
from crate_mae.interpret.layer_measures import (
    LayerMeasure,
    Values,
    bases,
    has_subspaces,
    rates_in_subspaces,
    sparsity,
    step_start,
    stream,
)
from crate_mae.interpret.statistics import find
from crate_mae.interpret.steps import measure_claims
from crate_mae.interpret.tokens import token_colours
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.classifier import untrained
from crate_mae.models.completion import Completion, complete, completion_of, flat_patches
from crate_mae.models.features import depth, encode, evaluating, transform_of
from crate_mae.models.interventions import intervene
from crate_mae.models.tracing import trace
from crate_mae.models.weights import is_untrained, load_autoencoder

_RATE = "subspace_rate_normalised"
_MOST_VARIED = 6  # atoms that are named
_SEED = 0  # of random initialisation


@dataclass(frozen=True)
class AppModel:
    """A model in `eval()` mode, on the CPU."""

    name: str  # as the user wrote it
    net: MaskedAutoencoder
    is_random: bool = False  # whether its weights are a random initialisation
    # Held while the model is traced, since tracing adds hooks to it.
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.net.grid_size

    @property
    def depth(self) -> int:
        """Number of layers of the encoder."""
        return depth(self.net.encoder)

    @cached_property
    def untrained(self) -> "AppModel":
        """The same network with random initialisation."""
        return AppModel(f"{self.name}, random initialisation", untrained(self.net.config, _SEED), is_random=True)


def open_models(names: Sequence[str]) -> dict[str, AppModel]:
    """Load models by name, in order; repeated names are loaded once.

    Raises:
        UserError: for a model that cannot be loaded, has no decoder, or takes neither grey nor colour images.
    """
    found = {}
    for name in map(str, names):
        with default_generator_seeded(_SEED):
            net = load_autoencoder(name)
        if net.config.in_chans not in (1, 3):
            raise UserError(
                f"{name} takes images of {net.config.in_chans} channels, but the app has only grey and colour ones."
            )
        found[name] = AppModel(name, net, is_random=is_untrained(name))
    return found


class Completed(NamedTuple):
    """One completed picture."""

    pictures: Completion
    hidden: tuple[int, int]  # number of hidden patches, and of all
    psnr: float  # of the hidden patches, in decibels
    flat_psnr: float  # the baseline: that of patches without a pattern in their place; see `flat_patches`


class Inside(NamedTuple):
    """Tokens and attention of one layer for a whole picture."""

    colours: Float[np.ndarray, "gh gw 3"]  # three principal components of the layer's tokens, in [0, 1]
    explained: float  # share of the tokens' variance that the three components explain together
    heads: Float[np.ndarray, "h gh gw"]  # attention of one patch to every patch, head by head
    patch: int  # number of that patch, row by row
    even: float  # attention to each token if it were uniform


class ChangedAtom(NamedTuple):
    """What the decoder draws with one atom of a layer raised or lowered in all visible patches."""

    active: Float[np.ndarray, "gh gw"]  # the atom's activation in each patch of the whole picture
    completed: Float[Tensor, "c hh ww"]  # the completion as it is
    changed: Float[Tensor, "c hh ww"]  # the completion with the changed atom
    size: float  # root mean square of the change in hidden pixels, which are in [0, 1]
    varied: list[int]  # the atoms whose activation varies most over the patches; the first varies most
    atoms: int  # number of atoms in the layer


class Curves(NamedTuple):
    """Measures of every layer of the encoder for a whole picture; empty where a network has no subspaces or codes."""

    rate_before: list[float]  # subspace rate R^c of the tokens at a layer's input, as its MSSA sees them, in nats
    rate_after: list[float]  # the same after the step that is derived to lower it
    zeros: list[float]  # share of exact zeros in the layer's code
    audit: list[AuditRow]  # every claim about single images, tested on this picture


def prepare(model: MaskedAutoencoder, picture: Image.Image) -> Float[Tensor, "1 c hh ww"]:
    """Prepare a picture as model input: its centre, scaled and normalised."""
    return transform_of(model.config)(picture)[None]


def seeded_mask(model: MaskedAutoencoder, mask_ratio: float, seed: int) -> Bool[Tensor, "gh gw"]:
    """Draw the mask that `crate-mae reconstruct` uses for its first image."""
    return nested_masks(1, model.num_patches, mask_ratio, seed).unflatten(1, model.grid_size)[0]


def fit_mask(mask: Bool[Tensor, "gh gw"], grid_size: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
    """Fit a mask to another grid: a patch is hidden if the one at its centre is."""
    old_grid = (mask.shape[0], mask.shape[1])
    at_centres = [fit_patch(patch, grid_size, old_grid) for patch in range(grid_size[0] * grid_size[1])]
    return mask.flatten()[at_centres].unflatten(0, grid_size)


def fit_patch(patch: int, grid: tuple[int, int], new_grid: tuple[int, int]) -> int:
    """Return the number of the patch of another grid that contains the centre of a patch."""
    row, column = (
        (2 * at + 1) * new // (2 * old) for at, old, new in zip(divmod(patch, grid[1]), grid, new_grid, strict=True)
    )
    return row * new_grid[1] + column


def mask_text(mask: Bool[Tensor, "gh gw"]) -> str:
    """Write a mask as text: "1" where a patch is hidden, row by row."""
    return "".join("1" if hidden else "0" for hidden in mask.flatten().tolist())


def mask_from_text(text: object, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
    """Read a mask that `mask_text` wrote.

    Raises:
        UserError: if it is not a mask of this grid.
    """
    if not isinstance(text, str) or len(text) != grid[0] * grid[1] or set(text) - {"0", "1"}:
        raise UserError("The mask does not fit the picture: draw a new one.")
    return torch.tensor([mark == "1" for mark in text]).unflatten(0, grid)


def complete_picture(model: MaskedAutoencoder, picture: Image.Image, mask: Bool[Tensor, "gh gw"]) -> Completed:
    """Hide patches of a picture and complete it with the model.

    Raises:
        UserError: if nothing is hidden, or the model's weights are not finite.
    """
    _refuse_nothing_hidden(mask)
    image, flat = prepare(model, picture), mask.flatten()[None]
    with evaluating(model):
        found = complete(model, image, flat)
        if not found.completed.isfinite().all():
            raise UserError("This model's predictions are not finite: its weights are damaged.")
    plain = completion_of(model.config, image, flat, flat_patches(model, image, flat))
    psnr, flat_psnr = (
        float(completion_quality(each, flat, model.config.patch_size).psnr[0]) for each in (found, plain)
    )
    return Completed(found, (int(mask.sum()), mask.numel()), psnr, flat_psnr)


def _refuse_nothing_hidden(mask: Bool[Tensor, "gh gw"]) -> None:
    if not mask.any():
        raise UserError("Nothing is hidden, so there is nothing to complete: paint over some patches.")


def look_inside(model: MaskedAutoencoder, picture: Image.Image, layer: int, patch: int) -> Inside:
    """Compute tokens of one layer of the encoder and the attention of one patch, with nothing hidden.

    Raises:
        UserError: if there is no such layer or patch, or the model's weights are not finite.
    """
    encoder, image = model.encoder, prepare(model, picture)
    if not 0 <= patch < model.num_patches:
        raise UserError(f"There is no patch {patch}: this model has {model.num_patches}.")
    with evaluating(model), trace(encoder, ["blocks.*.attention"]) as record:
        tokens = encode(encoder, image, layer, "tokens")
    attention = record[f"blocks.{layer}.attention"][0]
    colours = token_colours(tokens, model.grid_size)
    heads = attention_on_grid(attention, model.grid_size, query=encoder.num_prefix_tokens + patch)
    shares, even = heads[0].float().numpy(), 1 / attention.shape[-1]
    return Inside(colours.pictures[0], float(colours.explained.sum()), shares, patch, even)


def change_atom(
    model: MaskedAutoencoder,
    picture: Image.Image,
    mask: Bool[Tensor, "gh gw"],
    layer: int,
    atom: int,
    amount: float,
) -> ChangedAtom:
    """Complete a picture with one atom of an encoder layer's code raised or lowered in all visible patches.

    Args:
        model: an autoencoder with sparse codes.
        picture: of any size.
        mask: True where a patch is hidden.
        layer: of the encoder, from 0.
        atom: its number.
        amount: what is added, in standard deviations of all activations of the layer in the whole picture. An
            activation does not fall below 0.

    Raises:
        UserError: if nothing is hidden, for a model without codes, or if there is no such atom.
    """
    _refuse_nothing_hidden(mask)
    codes = codes_of(model, picture, layer)
    if not 0 <= atom < (atoms := codes.shape[1]):
        raise no_atom(atom, layer, atoms)
    image, flat = prepare(model, picture), mask.flatten()[None]
    step = amount * float(codes.std()) * is_visible_patch(model, flat)
    with evaluating(model):
        completed = complete(model, image, flat)
        code = f"encoder.blocks.{layer}.code[{atom}]"
        with intervene(model, {code: lambda active: (active + step.to(active)).clamp(min=0)}):
            changed = complete(model, image, flat)
    size = (changed.completed - completed.completed).float().square().mean() * mask.numel() / mask.sum()
    active = codes[:, atom].unflatten(0, model.grid_size).numpy()
    return ChangedAtom(
        active, completed.completed[0], changed.completed[0], float(size.sqrt()), varied_atoms(codes), atoms
    )


def codes_of(model: MaskedAutoencoder, picture: Image.Image, layer: int) -> Float[Tensor, "n m"]:
    """Compute the code of every patch of the whole picture.

    Raises:
        UserError: for a model without codes.
    """
    with_code(model, layer)
    (codes,) = of_codes(model, f"encoder.blocks.{layer}.code", prepare(model, picture), 1, lambda code: code[0].float())
    return codes


def varied_atoms(codes: Float[Tensor, "n m"]) -> list[int]:
    """Return the atoms whose activation varies most from patch to patch, the first varies most."""
    return codes.std(0).argsort(descending=True, stable=True)[:_MOST_VARIED].tolist()


def measure_curves(model: MaskedAutoencoder, picture: Image.Image) -> Curves:
    """Measure subspace rate, sparsity and claims of every layer of the encoder, with nothing hidden.

    Raises:
        UserError: if the model's weights are not finite.
    """
    image = prepare(model, picture)
    measures = [
        LayerMeasure("subspace rate", ("z", "z_half"), _subspace_rates, has_subspaces),
        LayerMeasure("sparsity of codes", ("code",), lambda layer, code: sparsity("code", layer, code)),
    ]
    with evaluating(model):
        rows = stream(model.encoder, [image], measures)
        found = measure_claims(model.encoder, {"all": [image]}, pools=False)
    before, after, zeros = (
        [row.mean for row in find(rows, measure, point)]
        for measure, point in ((_RATE, "z"), (_RATE, "z_half"), ("zero_fraction", "code"))
    )
    return Curves(before, after, zeros, audit(found))


def _subspace_rates(layer: torch.nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """Measure R^c of the tokens as the layer's attention sees them, before and after its step."""
    u, before, after = bases(layer), step_start(layer, points[0]), points[1]
    rates = (rates_in_subspaces(layer, tokens, u)[_RATE] for tokens in (before, after))
    return {(_RATE, point): rate for point, rate in zip(("z", "z_half"), rates, strict=True)}
