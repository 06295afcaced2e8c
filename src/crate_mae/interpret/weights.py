"""What was learned, from the weights alone: subspaces, output projections, dictionaries.

Values are of heads or of pairs of heads, and their spread is over these.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.interpret.layer_measures import bases, has_subspaces
from crate_mae.interpret.statistics import Row, not_finite, place_of, rows_of
from crate_mae.models.layers import ISTA, MSSA, Dictionary, OvercompleteISTA
from crate_mae.models.tracing import layers_of
from crate_mae.theory.measures import isometry_error, mutual_coherence
from crate_mae.theory.subspaces import affinity, match_up_to_scale, orthonormality_error, principal_cosines


def measure_weights(model: nn.Module) -> list[Row]:
    """Every layer's measures, of those parts that it has.

    | measure                            | is                                                                      |
    |------------------------------------|-------------------------------------------------------------------------|
    | `orthonormality_error`             | ||U_k^T U_k - I||_2 of each head                                        |
    | `orthonormality_error_scaled`      | the same after dividing U_k by its root-mean-square singular value      |
    | `head_coherence`                   | cosine of the smallest angle between the subspaces of two heads         |
    | `head_affinity`                    | mean squared cosine of their principal angles; p/d for random subspaces |
    | `output_cosine`, `output_error`    | of the free output projection W_k and the best s_k U_k of each head     |
    | `output_error_common`              | of all W_k together, with one scale s for the layer                     |
    | `dictionary_isometry_error`        | ||D^T D - I||_F / sqrt(m); 0 for orthonormal atoms                      |
    | `dictionary_isometry_error_scaled` | the same after the best scale of D                                      |
    | `dictionary_coherence`             | largest cosine between two atoms                                        |
    | `ista_step`                        | eta ||D||_2^2; at most 1 where ISTA is known not to raise its objective |

    Raises:
        UserError: if the weights are not finite.
    """
    layers = layers_of(model)
    refuse_non_finite(layers)
    with torch.no_grad():
        return [found for name, layer in layers.items() for found in _measure_layer(name, layer)]


def refuse_non_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise a `UserError` that names a layer with weights that are NaN or infinite, on which LAPACK would raise."""
    for name, layer in layers.items():
        for parameter, value in layer.named_parameters():
            if not value.isfinite().all():
                raise not_finite(place_of(name), parameter)


def _measure_layer(name: str, layer: nn.Module) -> Iterator[Row]:
    place = place_of(name)
    if has_subspaces(name, layer):
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
    """The free output projections W_k of MSSA(Z) = sum_k SSA(Z | U_k) W_k^T; None where they are tied to the U_k."""
    attn = layer.get_submodule("attn")
    if not isinstance(attn, MSSA) or attn.proj is None:
        return None
    return attn.proj.weight.detach().unflatten(1, (attn.num_heads, -1)).transpose(0, 1)


def dictionary_of(layer: nn.Module) -> Float[Tensor, "d m"] | None:
    """D of an encoder's layer, as its step takes it, E of a decoder's; None of a layer without sparse coding."""
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
