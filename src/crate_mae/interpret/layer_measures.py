"""Measures of every layer, image by image: rates, sparsity, lengths, ranks, diversity; each is in `drawing.measures`.

Subspace rates are given at three points of a layer (`z`, `z_half`, `z_next`), all with the layer's own subspaces, and
in three forms, because a rate grows with the length of tokens and layers change lengths:

- `subspace_rate`: exact R^c(Z | U) of the tokens as they are;
- `subspace_rate_normalised`: exact R^c of the tokens as the layer's attention would see them, see `seen`;
- `subspace_rate_unit`: of those, with every projection scaled to unit length, and 0.01 for eps^2.

`subspace_rate_official` is the last form where the official code takes it: at the input of MSSA, whose projections its
hook records. The point of that measure is called `projections`, once a layer.

A black-box Vision Transformer has no subspaces, and gets a stand-in for that last form, see `value_rates`. The
objective is given by its parts, R, R^c and lambda ||Z||_0, since lambda = 0.1 makes their sum nearly a count of
non-zeros. R - R^c of a single image is not given: an image has fewer tokens than dimensions, which caps R far below
R^c; `pooled` has it over all images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.interpret.statistics import Row, not_finite, place_of, rows_over_layers
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.layers import DecoderLayer, SubspaceAttention
from crate_mae.models.tracing import layers_of, taps_of, trace
from crate_mae.theory.coding_rate import coding_rate, official_subspace_coding_rate, projected_coding_rate
from crate_mae.theory.derivatives import at_least_float
from crate_mae.theory.measures import effective_rank, gini, l1_to_l2, participation_ratio, token_diversity
from crate_mae.theory.subspaces import best_subspace_energy, project

POINTS = ("z", "z_half", "z_next")
SUBSPACES = "subspace rates"
STAND_IN = "subspace rates by value projections"
EPS = 0.5  # distortion of the exact rates, that of the papers
SPARSITY_WEIGHT = 0.1  # lambda of the objective

Values = Mapping[tuple[str, str], Float[Tensor, "b"]]  # (measure, point) -> one value an image
Forward = Callable[[nn.Module, Any], object]  # runs a model on a batch


def default_pass(model: nn.Module, images: Float[Tensor, "b c hh ww"]) -> object:
    """Run a model on whole images: an autoencoder with its decoder, anything else up to its features."""
    if isinstance(model, MaskedAutoencoder):
        return model(images, mask=images.new_zeros(len(images), model.num_patches, dtype=torch.bool))
    features: Any = model.forward_features
    return features(images)


class LayerMeasure(NamedTuple):
    """Something that can be measured of one layer, image by image.

    Attributes:
        name: in the list of measures that no layer has.
        needs: the intermediates that it is a function of, by their names in `models.tracing.trace`.
        values: from the layer and these intermediates (in float32 at least) to values of each image.
        applies: whether it applies to a layer that has these intermediates.
    """

    name: str
    needs: tuple[str, ...]
    values: Callable[..., Values]
    applies: Callable[[nn.Module], bool] = lambda _layer: True

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the layer has it."""
        return set(self.needs) <= set(taps_of(layer)) and self.applies(layer)


def stream(
    model: nn.Module,
    batches: Iterable[Any],
    measures: Sequence[LayerMeasure],
    *,
    forward: Forward = default_pass,
) -> list[Row]:
    """Measure the layers of a model on batches of any number: means and spreads over images, layer by layer.

    Intermediates of a layer are measured and dropped as soon as the layer is done, so that never more than one layer's
    are held. The measures are computed in float32 (rates in float64), also if the pass is under autocast.

    Args:
        model: ours, or anything with timm's `blocks`; in `eval()` mode.
        batches: what `forward` takes; by default normalised images.
        measures: see `layer_measures` and `weights.inverse_measures`.
        forward: runs the model on a batch.

    Raises:
        UserError: if a value is not finite, or there is no batch.
    """
    layers = layers_of(model)
    plan = {name: [measure for measure in measures if measure.is_of(layer)] for name, layer in layers.items()}
    plan = {name: chosen for name, chosen in plan.items() if chosen}
    if not plan:
        return []
    kept: dict[str, dict[tuple[str, str], list[Tensor]]] = {name: {} for name in plan}
    patterns = sorted({f"{name}.{kind}" for name, chosen in plan.items() for m in chosen for kind in m.needs})
    with torch.no_grad(), trace(model, patterns) as record, ExitStack() as hooks:
        for name, chosen in plan.items():  # these run after the hooks of the trace, and take what those collected
            take = partial(_measure_layer, name, chosen, record, kept[name])
            hooks.enter_context(layers[name].register_forward_hook(take))
        for batch in batches:
            forward(model, batch)
    rows = []
    for key in dict.fromkeys(key for found in kept.values() for key in found):
        values = {place_of(name): torch.cat(found[key]) for name, found in kept.items() if key in found}
        rows += rows_over_layers(values, *key)
    return rows


def missing(model: nn.Module, measures: Sequence[LayerMeasure]) -> list[str]:
    """Names of the measures that no layer of the model has."""
    layers = layers_of(model).values()
    found = {measure.name for measure in measures if any(map(measure.is_of, layers))}
    return [measure.name for measure in measures if measure.name not in found]


def _measure_layer(
    name: str,
    measures: Sequence[LayerMeasure],
    record: dict[str, list[Tensor]],
    kept: dict[tuple[str, str], list[Tensor]],
    layer: nn.Module,
    _inputs: Any,
    _output: Any,
) -> None:
    """A hook of a layer: take its intermediates out of the record, and keep what is measured of them."""
    kinds = {kind for measure in measures for kind in measure.needs}
    tensors = {kind: at_least_float(record[f"{name}.{kind}"].pop()) for kind in kinds}
    for kind, tensor in tensors.items():  # on NaN, LAPACK would raise an error without a sentence
        if not tensor.isfinite().all():
            raise not_finite(place_of(name), kind)
    device = next(iter(tensors.values())).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for measure in measures:
            for key, values in measure.values(layer, *(tensors[kind] for kind in measure.needs)).items():
                if not values.isfinite().all():
                    raise not_finite(place_of(name), key[0])
                kept.setdefault(key, []).append(values.cpu())


def layer_measures() -> list[LayerMeasure]:
    """All measures of this module, for `stream`."""
    return [
        LayerMeasure(SUBSPACES, POINTS, subspace_rates, has_subspaces),
        LayerMeasure(STAND_IN, POINTS, value_rates, has_value_projections),
        *(LayerMeasure("coding rates", (point,), partial(coding_rates, point)) for point in POINTS),
        LayerMeasure("attention on the token itself", ("attention",), self_attention),
        LayerMeasure("ranks and token diversity", ("z_next",), spectra),
        LayerMeasure("sparsity of tokens", ("z_next",), partial(sparsity, "z_next")),
        LayerMeasure("sparsity of codes", ("code",), partial(sparsity, "code")),
    ]


def has_subspaces(layer: nn.Module) -> bool:
    """Whether the layer's attention is one within subspaces."""
    return isinstance(getattr(layer, "attn", None), SubspaceAttention)


def has_value_projections(layer: nn.Module) -> bool:
    """Whether the layer is a block of timm whose heads have values of their own, behind a LayerNorm."""
    attn = getattr(layer, "attn", None)
    return isinstance(layer, Block) and isinstance(attn, Attention) and isinstance(layer.norm1, nn.LayerNorm)


def attention_of(layer: nn.Module) -> Any:
    """A layer's attention within subspaces, with the methods of `models.layers.MSSA`."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, SubspaceAttention)
    return attn


def attention_norm(layer: nn.Module) -> nn.Module:
    """The normalisation that comes before a layer's attention."""
    name = "norm2" if isinstance(layer, DecoderLayer) else "norm1"
    return layer.get_submodule(name)


def normalised(norm: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """LayerNorm with the weights of `norm`, in the precision of the tokens and without calling hooks."""
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
    return normalised(attention_norm(layer), tokens) if layer.starts_from_norm else tokens


def seen(layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Tokens as the layer's attention would see them: after its normalisation.

    Where the step starts from normalised tokens already, they are scaled to equal lengths instead: the weights of the
    normalisation would be applied twice.
    """
    return equal_lengths(tokens) if layer.starts_from_norm else normalised(attention_norm(layer), tokens)


def bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The subspaces of a layer, in float32 at least."""
    return at_least_float(attention_of(layer).bases())


def value_bases(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """The value projections W_v of a block of timm, head by head, without their biases; in float32 at least."""
    attn = layer.get_submodule("attn")
    assert isinstance(attn, Attention)
    return at_least_float(attn.qkv.weight.chunk(3)[2].unflatten(0, (attn.num_heads, -1)).mT)


def subspace_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """R^c in its forms, lambda ||Z||_0, energy in the best subspaces, and by how much the step changes lengths."""
    u, is_decoder = bases(layer), isinstance(layer, DecoderLayer)
    tokens_at, found = dict(zip(POINTS, points, strict=True)), {}
    before, after = ("z_half", "z_next") if is_decoder else ("z", "z_half")
    hooked = project(normalised(attention_norm(layer), tokens_at[before]), u)
    found["subspace_rate_official", "projections"] = official_subspace_coding_rate(hooked)
    tokens_at[before] = step_start(layer, tokens_at[before])
    for point, tokens in tokens_at.items():
        for measure, rate in rates_in_subspaces(layer, tokens, u).items():
            found[measure, point] = rate
        found["sparsity_penalty", point] = SPARSITY_WEIGHT * tokens.count_nonzero(dim=(1, 2)).float()
        found["best_subspace_energy", point] = best_subspace_energy(tokens, u)
    lengths = {point: tokens_at[point].norm(dim=-1) for point in (before, after)}
    found["length_ratio", ""] = (lengths[after] / lengths[before].clamp_min(1e-12)).mean(1)
    return found


def rates_in_subspaces(
    layer: nn.Module, tokens: Float[Tensor, "b n d"], u: Float[Tensor, "h d p"]
) -> Mapping[str, Float[Tensor, "b"]]:
    """R^c of each image in its three forms, by their measures."""
    w = project(seen(layer, tokens), u)
    return {
        "subspace_rate": projected_coding_rate(project(tokens, u), EPS),
        "subspace_rate_normalised": projected_coding_rate(w, EPS),
        "subspace_rate_unit": official_subspace_coding_rate(w),
    }


def value_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """A stand-in for R^c where heads have no subspaces: `subspace_rate_unit` with W_v of head k for U_k.

    MSSA has one matrix where a Transformer has three. Taken is that of the values, since what attention mixes and
    passes on are values, as MSSA mixes and passes on Z U_k: a head that compresses anything compresses those. Queries
    and keys only determine how much of which token is mixed. The unit length of projections makes the scale of W_v
    irrelevant, and a bias, which is not part of a subspace, is left out.

    It is not a subspace rate: the columns of W_v are not orthonormal, tokens are compared by other projections, and no
    step was derived to lower it. Its height does not compare with networks of other widths or numbers of heads; its
    trend over layers, next to that of random initialisation, shows whether the values of an image become more alike.
    """
    w_v, norm = value_bases(layer), attention_norm(layer)
    projected = (project(normalised(norm, tokens), w_v) for tokens in points)
    rates = {point: official_subspace_coding_rate(w) for point, w in zip(POINTS, projected, strict=True)}
    return {("value_rate_official", point): rate for point, rate in (rates | {"projections": rates["z"]}).items()}


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
