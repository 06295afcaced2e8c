"""Encoder and decoder as each other's inverses: decoder layer L + 1 - l is meant to undo encoder layer l."""

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from crate_mae.interpret.layer_measures import bases, has_subspaces
from crate_mae.interpret.statistics import Row, place_of, rows_of
from crate_mae.interpret.streaming import LayerMeasure, Values
from crate_mae.interpret.weights import dictionary_of, refuse_non_finite
from crate_mae.models.layers import ISTA
from crate_mae.models.tracing import layers_of
from crate_mae.theory.subspaces import affinity, match_up_to_scale


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
    """How alike are the weights of an encoder layer and of the decoder layer that is meant to undo it.

    | measure                     | is                                                                                |
    |-----------------------------|-----------------------------------------------------------------------------------|
    | `inverse_dictionary_cosine` | of the encoder's D and the decoder's E, as vectors: cosine, whatever their scale  |
    | `inverse_operator_cosine`   | of the identity and W E^T, where ISTA is relu(X W - eta lambda): the way back     |
    | `inverse_subspace_affinity` | between the subspaces of both, heads matched one to one so that the sum is largest|

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
            found = _likenesses(likeness, layers[name], [partner])
            if found is not None:
                values[measure] = found
                control = _likenesses(likeness, layers[name], others)
                if control is not None:
                    values[f"{measure}_control"] = control
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

    return [LayerMeasure("inverses on tokens", ("z", "z_next"), values, lambda _name, layer: id(layer) in pairs)]


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


def _likenesses(
    likeness: Callable[[nn.Module, nn.Module], Tensor | None], layer: nn.Module, others: list[nn.Module]
) -> Float[Tensor, "k"] | None:
    found = [value for other in others if (value := likeness(layer, other)) is not None]
    return torch.stack(found) if found else None


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
    if not has_subspaces("", layer) or not has_subspaces("", other):
        return None
    u, v = bases(layer).double(), bases(other).double()
    table = torch.stack([affinity(u_k, v_l) for u_k, v_l in product(u, v)]).view(len(u), len(v))
    rows, columns = linear_sum_assignment(-table.cpu().numpy())
    return table[rows, columns].mean()
