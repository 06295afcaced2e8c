"""What is measured of every layer, image by image: rates, sparsity, ranks, diversity.

Rates are given at three points of a layer (`z`, `z_half`, `z_next`), all with the layer's own subspaces, and in three
forms, because a rate grows with the length of tokens and layers change lengths:

- `subspace_rate`: exact R^c(Z | U) of the tokens as they are;
- `subspace_rate_normalised`: exact R^c(LN(Z) | U) after the normalisation that comes before the layer's MSSA, so that
  all three points are measured as MSSA would see them;
- `subspace_rate_official`: as the official code, projections after that normalisation scaled to unit length.

A black-box Vision Transformer has no subspaces, and gets a stand-in for the last form alone: `value_rate_official`, see
`value_rates`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.interpret.streaming import LayerMeasure, Values
from crate_mae.models.layers import MSSA, DecoderLayer
from crate_mae.theory.coding_rate import (
    coding_rate,
    official_subspace_coding_rate,
    projected_coding_rate,
    subspace_coding_rate,
)
from crate_mae.theory.measures import effective_rank, gini, l1_to_l2, participation_ratio, token_diversity
from crate_mae.theory.subspaces import best_subspace_energy, project

POINTS = ("z", "z_half", "z_next")
SUBSPACES = "subspace rates"
STAND_IN = "subspace rates by value projections"
SUBSPACE_RATES = ("subspace_rate", "subspace_rate_normalised", "subspace_rate_official")
VALUE_RATE = "value_rate_official"
EPS = 0.5  # distortion of the exact rates, that of the papers
SPARSITY_WEIGHT = 0.1  # lambda of the objective


def layer_measures() -> list[LayerMeasure]:
    """Everything of this module, for `streaming.stream`."""
    return [
        LayerMeasure(SUBSPACES, POINTS, subspace_rates, has_subspaces),
        LayerMeasure(STAND_IN, POINTS, value_rates, has_value_projections),
        *(LayerMeasure("coding rates", (point,), partial(coding_rates, point)) for point in POINTS),
        LayerMeasure("ranks and token diversity", ("z_next",), spectra),
        LayerMeasure("sparsity of tokens", ("z_next",), partial(sparsity, "z_next")),
        LayerMeasure("sparsity of codes", ("code",), partial(sparsity, "code")),
    ]


def has_subspaces(_name: str, layer: nn.Module) -> bool:
    """Whether the layer's attention is MSSA."""
    return isinstance(getattr(layer, "attn", None), MSSA)


def has_value_projections(_name: str, layer: nn.Module) -> bool:
    """Whether the layer is a block of timm whose heads have values of their own, behind a LayerNorm."""
    attn = getattr(layer, "attn", None)
    return isinstance(layer, Block) and isinstance(attn, Attention) and isinstance(layer.norm1, nn.LayerNorm)


def attention_norm(layer: nn.Module) -> nn.Module:
    """The normalisation that comes before a layer's attention."""
    name = "norm2" if isinstance(layer, DecoderLayer) else "norm1"
    return layer.get_submodule(name)


def normalised(norm: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """LayerNorm with the weights of `norm`, in the precision of the tokens and unheard by hooks."""
    assert isinstance(norm, nn.LayerNorm)
    weight, bias = (x if x is None else x.to(tokens.dtype) for x in (norm.weight, norm.bias))
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, norm.eps)


def bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The subspaces of a layer, in float32 at least."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, MSSA)
    u = attn.bases()
    return u.to(torch.promote_types(u.dtype, torch.float32))


def value_bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The value projections W_v of a block of timm, head by head, without their biases; in float32 at least."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, Attention)
    weight = attn.qkv.weight.chunk(3)[2]
    return weight.unflatten(0, (attn.num_heads, -1)).mT.to(torch.promote_types(weight.dtype, torch.float32))


def subspace_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """R^c in three forms, R - R^c, the objective R - R^c - lambda ||Z||_0, and the energy in the best subspaces."""
    u, norm, found = bases(layer), attention_norm(layer), {}
    for point, tokens in zip(POINTS, points, strict=True):
        w = project(normalised(norm, tokens), u)
        rate, subspace_rate = coding_rate(tokens, EPS), subspace_coding_rate(tokens, u, EPS)
        found["subspace_rate", point] = subspace_rate
        found["subspace_rate_normalised", point] = projected_coding_rate(w, EPS)
        found["subspace_rate_official", point] = official_subspace_coding_rate(w)
        found["rate_reduction", point] = rate - subspace_rate
        found["objective", point] = rate - subspace_rate - SPARSITY_WEIGHT * tokens.count_nonzero(dim=(1, 2))
        found["best_subspace_energy", point] = best_subspace_energy(tokens, u)
    return found


def value_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """A stand-in for R^c where heads have no subspaces: `subspace_rate_official` with W_v of head k for U_k.

    MSSA has one matrix where a Transformer has three. Taken is that of the values, since what attention mixes and
    passes on are values, as MSSA mixes and passes on U_k^T z: a head that compresses anything compresses those. Queries
    and keys only say how much of which token is mixed. The unit length of projections makes the scale of W_v
    irrelevant, and a bias, which is no part of a subspace, is left out.

    It is no subspace rate: the columns of W_v are not orthonormal, tokens are compared by other projections, and no
    step was derived to lower it. Neither does it compare in height with networks of other widths, or numbers of heads;
    its course over layers, next to that of random weights, says whether the values of an image become more alike.
    """
    w_v, norm = value_bases(layer), attention_norm(layer)
    projected = (project(normalised(norm, tokens), w_v) for tokens in points)
    return {(VALUE_RATE, point): official_subspace_coding_rate(w) for point, w in zip(POINTS, projected, strict=True)}


def coding_rates(point: str, _layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Values:
    """R(Z) of the tokens as they are, and with every token normalised to mean 0 and deviation 1."""
    unit = F.layer_norm(tokens, tokens.shape[-1:])
    return {
        ("coding_rate", point): coding_rate(tokens, EPS),
        ("coding_rate_normalised", point): coding_rate(unit, EPS),
    }


def spectra(_layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Values:
    """How many directions the tokens of an image use, and how much they differ."""
    return {
        ("effective_rank", "z_next"): effective_rank(tokens),
        ("participation_ratio", "z_next"): participation_ratio(tokens),
        ("token_diversity", "z_next"): torch.stack([token_diversity(image) for image in tokens]),
    }


def sparsity(point: str, _layer: nn.Module, codes: Float[Tensor, "b n m"]) -> Values:
    """Share of exact zeros, l1/l2 and Gini index, means over tokens."""
    return {
        ("zero_fraction", point): (codes == 0).float().mean((1, 2)),
        ("l1_to_l2", point): l1_to_l2(codes).mean(1),
        ("gini", point): gini(codes).mean(1),
    }
