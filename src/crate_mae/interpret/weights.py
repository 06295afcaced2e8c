"""Measures of weights, and how well decoder layers undo encoder layers; each is in `drawing.measures`.

Values are of heads or of pairs of heads or layers, and their spread is over these.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from crate_mae.interpret.layer_measures import LayerMeasure, Values, bases, has_subspaces
from crate_mae.interpret.statistics import Row, not_finite, place_of, rows_of
from crate_mae.models.layers import ISTA, Dictionary, OvercompleteISTA
from crate_mae.models.tracing import layers_of
from crate_mae.theory.measures import isometry_error, mutual_coherence
from crate_mae.theory.subspaces import affinity, match_up_to_scale, orthonormality_error, principal_cosines


def measure_weights(model: nn.Module) -> list[Row]:
    """Measure the subspaces, output projections and dictionaries of every layer, as far as it has them.

    Raises:
        UserError: if the weights are not finite.
    """
    layers = layers_of(model)
    refuse_non_finite(layers)
    with torch.no_grad():
        return [found for name, layer in layers.items() for found in _measure_layer(name, layer)]


def refuse_non_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise a `UserError` that names a layer with weights that are NaN or infinite, on which LAPACK would fail."""
    for name, layer in layers.items():
        for parameter, value in layer.named_parameters():
            if not value.isfinite().all():
                raise not_finite(place_of(name), parameter)


def _measure_layer(name: str, layer: nn.Module) -> Iterator[Row]:
    place = place_of(name)
    if has_subspaces(layer):
        u = bases(layer).double()
        yield from rows_of(place, _subspaces(u), "heads")
        if len(u) > 1:
            yield from rows_of(place, _pairs(u), "pairs")
        w = output_projections(layer)
        if w is not None:
            match = match_up_to_scale(w.double(), u)
            yield from rows_of(place, {"output_cosine": match.cosine, "output_error": match.error}, "heads")
            common = match_up_to_scale(w.double().flatten(0, 1), u.flatten(0, 1))
            yield from rows_of(place, {"output_error_common": common.error.reshape(1)}, "layer")
    dictionary = dictionary_of(layer)
    if dictionary is not None:
        values = {measure: value.reshape(1) for measure, value in _dictionary(dictionary.double()).items()}
        ista = getattr(layer, "ista", None)
        if isinstance(ista, (ISTA, OvercompleteISTA)):
            norm = torch.linalg.matrix_norm(dictionary.double(), ord=2)
            values["ista_step"] = ista.step_size * norm.square().reshape(1)
        yield from rows_of(place, values, "layer")


def output_projections(layer: nn.Module) -> Float[Tensor, "h d p"] | None:
    """The free output projections W_k of sum_k (step of head k) W_k^T; None where they are tied to subspaces U_k."""
    attn: Any = layer.get_submodule("attn")
    if getattr(attn, "proj", None) is None:
        return None
    return attn.proj.weight.detach().unflatten(1, (attn.num_heads, -1)).transpose(0, 1)


def dictionary_of(layer: nn.Module) -> Float[Tensor, "d m"] | None:
    """D of an encoder's layer, as its step takes it, E of a decoder's; None for a layer without sparse coding."""
    ista, dictionary = getattr(layer, "ista", None), getattr(layer, "dictionary", None)
    if isinstance(ista, (ISTA, OvercompleteISTA)):
        return ista.lasso_dictionary().detach()
    return dictionary.weight.detach() if isinstance(dictionary, Dictionary) else None


def _subspaces(u: Float[Tensor, "h d p"]) -> dict[str, Float[Tensor, "h"]]:
    size = u.square().sum((1, 2), keepdim=True).div(u.shape[-1]).sqrt()
    scaled = u / torch.where(size == 0, 1, size)
    return {
        "orthonormality_error": torch.stack([orthonormality_error(u_k[None]) for u_k in u]),
        "orthonormality_error_scaled": torch.stack([orthonormality_error(u_k[None]) for u_k in scaled]),
    }


def _pairs(u: Float[Tensor, "h d p"]) -> dict[str, Float[Tensor, "k"]]:
    first, second = torch.triu_indices(len(u), len(u), offset=1)
    return {
        "head_coherence": principal_cosines(u[first], u[second])[:, 0],
        "head_affinity": affinity(u[first], u[second]),
    }


def _dictionary(dictionary: Float[Tensor, "d m"]) -> dict[str, Float[Tensor, ""]]:
    # ||s^2 D^T D - I||_F is smallest for s^2 = ||D||_F^2 / ||D^T D||_F^2.
    energy, fourth = dictionary.square().sum(), (dictionary.mT @ dictionary).square().sum()
    scale = (energy / torch.where(fourth == 0, 1, fourth)).sqrt()
    return {
        "dictionary_isometry_error": isometry_error(dictionary),
        "dictionary_isometry_error_scaled": isometry_error(scale * dictionary),
        "dictionary_coherence": mutual_coherence(dictionary),
    }


def layer_pairs(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layer that is meant to undo each encoder layer, by the encoder layer's name; empty if there is none.

    There is one where encoder and decoder have the same number of layers of the same width.
    """
    layers = layers_of(model)
    encoder = [name for name in layers if place_of(name)[0] == "encoder"]
    decoder = [layer for name, layer in layers.items() if place_of(name)[0] == "decoder"]
    if len(encoder) != len(decoder) or _width(model, "encoder") != _width(model, "decoder"):
        return {}
    return dict(zip(encoder, reversed(decoder), strict=True))


def _width(model: nn.Module, part: str) -> int:
    norm = model.get_submodule(f"{part}.norm")
    assert isinstance(norm, nn.LayerNorm)
    return norm.normalized_shape[0]


@torch.no_grad()
def measure_inverse_weights(model: nn.Module) -> list[Row]:
    """Measure how alike the weights of an encoder layer and of the decoder layer that is meant to undo it are.

    Each has a `..._control`: the same between this encoder layer and all decoder layers that are not its partner.

    Raises:
        UserError: if the weights are not finite.
    """
    pairs = layer_pairs(model)
    layers = layers_of(model)
    refuse_non_finite(layers)
    rows: list[Row] = []
    for name, partner in pairs.items():
        others = [layer for layer in pairs.values() if layer is not partner]
        values = {}
        for measure, likeness in (
            ("inverse_dictionary_cosine", _dictionary_cosine),
            ("inverse_operator_cosine", _operator_cosine),
            ("inverse_subspace_affinity", _subspace_affinity),
        ):
            for named, compared in ((measure, [partner]), (f"{measure}_control", others)):
                found = [value for other in compared if (value := likeness(layers[name], other)) is not None]
                if found:
                    values[named] = torch.stack(found)
        rows += rows_of(place_of(name), values, "pairs")
    return rows


def inverse_measures(model: nn.Module) -> list[LayerMeasure]:
    """How well a decoder layer undoes its encoder layer on the tokens that this one really made, for `stream`.

    The decoder layer is given the encoder layer's output and compared with its input, image by image: `inverse_cosine`,
    and the relative error as it is (`inverse_error`) and after the best common scale (`inverse_error_scaled`). The
    control takes the encoder layer's output itself for its input: `inverse_..._identity`.
    """
    pairs = {id(layers_of(model)[name]): partner for name, partner in layer_pairs(model).items()}

    def values(layer: nn.Module, z: Float[Tensor, "b n d"], z_next: Float[Tensor, "b n d"]) -> Values:
        return _undone(pairs[id(layer)], z, z_next)

    return [LayerMeasure("inverses on tokens", ("z", "z_next"), values, lambda layer: id(layer) in pairs)]


def _undone(partner: nn.Module, z: Float[Tensor, "b n d"], z_next: Float[Tensor, "b n d"]) -> Values:
    found = {}
    parameter = next(partner.parameters())
    for suffix, guess in (("", partner(z_next.to(parameter.dtype)).to(z.dtype)), ("_identity", z_next)):
        match = match_up_to_scale(z, guess)
        norm = torch.linalg.matrix_norm(z)
        found[f"inverse_cosine{suffix}", ""] = match.cosine
        found[f"inverse_error{suffix}", ""] = torch.linalg.matrix_norm(z - guess) / torch.where(norm == 0, 1, norm)
        found[f"inverse_error_scaled{suffix}", ""] = match.error
    return found


def _dictionary_cosine(layer: nn.Module, other: nn.Module) -> Float[Tensor, ""] | None:
    d, e = dictionary_of(layer), dictionary_of(other)
    if d is None or e is None or d.shape != e.shape:
        return None
    return match_up_to_scale(d.double(), e.double()).cosine


def _operator_cosine(layer: nn.Module, other: nn.Module) -> Float[Tensor, ""] | None:
    ista, e = getattr(layer, "ista", None), dictionary_of(other)
    if not isinstance(ista, ISTA) or e is None or e.shape != ista.dictionary.shape:
        return None
    there_and_back = ista.operator().double() @ e.double().mT
    return match_up_to_scale(torch.eye(len(e), dtype=e.double().dtype, device=e.device), there_and_back).cosine


def _subspace_affinity(layer: nn.Module, other: nn.Module) -> Float[Tensor, ""] | None:
    if not has_subspaces(layer) or not has_subspaces(other):
        return None
    u, v = bases(layer).double(), bases(other).double()
    table = torch.stack([affinity(u_k, v_l) for u_k, v_l in product(u, v)]).view(len(u), len(v))
    rows, columns = linear_sum_assignment(-table.cpu().numpy())
    return table[rows, columns].mean()
