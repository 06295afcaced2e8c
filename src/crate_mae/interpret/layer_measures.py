"""What is measured of every layer, image by image: rates, sparsity, lengths, ranks, diversity.

Subspace rates are given at three points of a layer (`z`, `z_half`, `z_next`), all with the layer's own subspaces, and
in three forms, because a rate grows with the length of tokens and layers change lengths:

- `subspace_rate`: exact R^c(Z | U) of the tokens as they are;
- `subspace_rate_normalised`: exact R^c of the tokens as the layer's attention would see them, see `seen`;
- `subspace_rate_unit`: of those, with every projection scaled to unit length, and 0.01 for eps^2.

`subspace_rate_official` is the last form where the official code takes it: at the input of MSSA, whose projections its
hook records. The point of that measure is called `projections`, once a layer.

A black-box Vision Transformer has no subspaces, and gets a stand-in for that last form: `value_rate_official`, see
`value_rates`. The objective is given by its parts, R, R^c and lambda ||Z||_0, since lambda = 0.1 makes their sum nearly
a count of non-zeros. R - R^c of a single image is not given: an image has fewer tokens than dimensions, which caps R
far below R^c; `pooled` has it over all images.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.interpret.streaming import LayerMeasure, Values
from crate_mae.models.layers import DecoderLayer
from crate_mae.theory.coding_rate import (
    coding_rate,
    official_subspace_coding_rate,
    projected_coding_rate,
)
from crate_mae.theory.measures import effective_rank, gini, l1_to_l2, participation_ratio, token_diversity
from crate_mae.theory.subspaces import best_subspace_energy, project

POINTS = ("z", "z_half", "z_next")
SUBSPACES = "subspace rates"
STAND_IN = "subspace rates by value projections"
FORMS = ("as is", "normalised", "unit")  # of a subspace rate
RATE_OF = {"as is": "subspace_rate", "normalised": "subspace_rate_normalised", "unit": "subspace_rate_unit"}
OFFICIAL_RATE = "subspace_rate_official"
OFFICIAL_POINT = "projections"
VALUE_RATE = "value_rate_official"
LENGTH_RATIO = "length_ratio"
EPS = 0.5  # distortion of the exact rates, that of the papers
SPARSITY_WEIGHT = 0.1  # lambda of the objective


@runtime_checkable
class SubspaceAttention(Protocol):
    """Attention within subspaces, in the parts that it can be taken apart into; `models.layers.MSSA` is one."""

    def bases(self) -> Tensor:
        """U_k, h d p."""
        ...

    def project(self, x: Tensor) -> Tensor:
        """W_k = X U_k, b h n p."""
        ...

    def membership(self, w: Tensor) -> Tensor:
        """P_k, b h n n."""
        ...

    def step(self, w: Tensor, mixed: Tensor) -> Tensor:
        """The step in token space, b n d, from W_k and P_k W_k."""
        ...


def layer_measures() -> list[LayerMeasure]:
    """Everything of this module, for `streaming.stream`."""
    return [
        LayerMeasure(SUBSPACES, POINTS, subspace_rates, has_subspaces),
        LayerMeasure(STAND_IN, POINTS, value_rates, has_value_projections),
        *(LayerMeasure("coding rates", (point,), partial(coding_rates, point)) for point in POINTS),
        LayerMeasure("attention on the token itself", ("attention",), self_attention),
        LayerMeasure("ranks and token diversity", ("z_next",), spectra),
        LayerMeasure("sparsity of tokens", ("z_next",), partial(sparsity, "z_next")),
        LayerMeasure("sparsity of codes", ("code",), partial(sparsity, "code")),
    ]


def has_subspaces(_name: str, layer: nn.Module) -> bool:
    """Whether the layer's attention is one within subspaces."""
    return isinstance(getattr(layer, "attn", None), SubspaceAttention)


def has_value_projections(_name: str, layer: nn.Module) -> bool:
    """Whether the layer is a block of timm whose heads have values of their own, behind a LayerNorm."""
    attn = getattr(layer, "attn", None)
    return isinstance(layer, Block) and isinstance(attn, Attention) and isinstance(layer.norm1, nn.LayerNorm)


def attention_of(layer: nn.Module) -> SubspaceAttention:
    """A layer's attention within subspaces."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, SubspaceAttention)
    return attn


def attention_norm(layer: nn.Module) -> nn.Module:
    """The normalisation that comes before a layer's attention."""
    name = "norm2" if isinstance(layer, DecoderLayer) else "norm1"
    return layer.get_submodule(name)


def normalised(norm: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """LayerNorm with the weights of `norm`, in the precision of the tokens and unheard by hooks."""
    assert isinstance(norm, nn.LayerNorm)
    weight, bias = (x if x is None else x.to(tokens.dtype) for x in (norm.weight, norm.bias))
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, norm.eps)


def equal_lengths(tokens: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Every token scaled to length sqrt(d); zero tokens stay zero."""
    return tokens.shape[-1] ** 0.5 * F.normalize(tokens, dim=-1)


def step_start(layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The tokens that a layer's attention step is added to (subtracted from, in a decoder).

    Args:
        layer: with attention in subspaces.
        tokens: those that come to the normalisation in front of it.
    """
    starting: Any = layer.step_start
    return starting(tokens, normalised(attention_norm(layer), tokens))


def seen(layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Tokens as the layer's attention would see them: after its normalisation.

    Where the step starts from normalised tokens already, they are scaled to equal lengths instead: the weights of the
    normalisation would be applied twice.
    """
    starting: Any = layer.step_start
    before, after = torch.empty(1, 1, 1), torch.empty(1, 1, 1)
    is_normalised = starting(before, after) is after
    return equal_lengths(tokens) if is_normalised else normalised(attention_norm(layer), tokens)


def bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The subspaces of a layer, in float32 at least."""
    u = attention_of(layer).bases()
    return u.to(torch.promote_types(u.dtype, torch.float32))


def value_bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The value projections W_v of a block of timm, head by head, without their biases; in float32 at least."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, Attention)
    weight = attn.qkv.weight.chunk(3)[2]
    return weight.unflatten(0, (attn.num_heads, -1)).mT.to(torch.promote_types(weight.dtype, torch.float32))


def subspace_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """R^c in its forms, lambda ||Z||_0, energy in the best subspaces, and by how much the step changes lengths."""
    u, is_decoder = bases(layer), isinstance(layer, DecoderLayer)
    tokens_at, found = dict(zip(POINTS, points, strict=True)), {}
    before, after = ("z_half", "z_next") if is_decoder else ("z", "z_half")
    hooked = project(normalised(attention_norm(layer), tokens_at[before]), u)
    found[OFFICIAL_RATE, OFFICIAL_POINT] = official_subspace_coding_rate(hooked)
    tokens_at[before] = step_start(layer, tokens_at[before])
    for point, tokens in tokens_at.items():
        for form, rate in rates_in_subspaces(layer, tokens, u).items():
            found[RATE_OF[form], point] = rate
        found["sparsity_penalty", point] = SPARSITY_WEIGHT * tokens.count_nonzero(dim=(1, 2)).float()
        found["best_subspace_energy", point] = best_subspace_energy(tokens, u)
    lengths = {point: tokens_at[point].norm(dim=-1) for point in (before, after)}
    found[LENGTH_RATIO, ""] = (lengths[after] / lengths[before].clamp_min(1e-12)).mean(1)
    return found


def rates_in_subspaces(
    layer: nn.Module, tokens: Float[Tensor, "b n d"], u: Float[Tensor, "h d p"]
) -> Mapping[str, Float[Tensor, "b"]]:
    """R^c of each image in the three `FORMS`."""
    w = project(seen(layer, tokens), u)
    rates = projected_coding_rate(project(tokens, u), EPS), projected_coding_rate(w, EPS)
    return dict(zip(FORMS, (*rates, official_subspace_coding_rate(w)), strict=True))


def value_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """A stand-in for R^c where heads have no subspaces: `subspace_rate_unit` with W_v of head k for U_k.

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
    rates = {point: official_subspace_coding_rate(w) for point, w in zip(POINTS, projected, strict=True)}
    return {(VALUE_RATE, point): rate for point, rate in (rates | {OFFICIAL_POINT: rates["z"]}).items()}


def coding_rates(point: str, _layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Values:
    """R(Z) of the tokens as they are, and with every token scaled to length sqrt(d)."""
    return {
        ("coding_rate", point): coding_rate(tokens, EPS),
        ("coding_rate_normalised", point): coding_rate(equal_lengths(tokens), EPS),
    }


def self_attention(_layer: nn.Module, attention: Float[Tensor, "b h n n"]) -> Values:
    """How much of its attention a token gives to itself, mean over tokens and heads; uniform attention gives 1/n."""
    own = attention.diagonal(dim1=-2, dim2=-1).mean((1, 2))
    return {("self_attention", ""): own, ("self_attention_uniform", ""): torch.full_like(own, 1 / attention.shape[-1])}


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
