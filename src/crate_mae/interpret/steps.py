"""The claims of the audit in numbers: each layer's steps and their controls, on the tokens of the same images.

A network is walked layer by layer with the tokens of all images at hand, so that what is pooled over images needs one
pass, and of one layer at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.interpret import audit as claims
from crate_mae.interpret import pooled
from crate_mae.interpret.audit import LayerClaims, Measured, Place, Tokens, margins_over
from crate_mae.interpret.layer_measures import (
    EPS,
    attention_norm,
    attention_of,
    bases,
    equal_lengths,
    has_subspaces,
    rates_in_subspaces,
)
from crate_mae.interpret.statistics import not_finite, place_of
from crate_mae.models.layers import DecoderLayer
from crate_mae.models.tracing import layers_of, trace, trace_layer
from crate_mae.theory.coding_rate import coding_rate
from crate_mae.theory.sparse_coding import lasso_objective
from crate_mae.theory.subspaces import orthonormal_bases, orthonormalised

GROUPS = 10  # of images, for the jackknife of pooled claims
# Claims by the measure that they are about.
_COMPRESS = {
    "subspace_rate": claims.COMPRESS,
    "subspace_rate_normalised": claims.COMPRESS_NORMALISED,
    "subspace_rate_unit": claims.COMPRESS_UNIT,
}
_DECOMPRESS = {
    "subspace_rate": claims.DECOMPRESS,
    "subspace_rate_normalised": claims.DECOMPRESS_NORMALISED,
    "subspace_rate_unit": claims.DECOMPRESS_UNIT,
}
_BEFORE, _AFTER, _MEANS = "before", "after", "means"

_Key = TypeVar("_Key")
_Sum = tuple[str, str]  # a claim, and which tokens are summed


class Moves(NamedTuple):
    """An attention step and its controls, all from the same tokens.

    Attributes:
        start: the tokens before it.
        after: the tokens after it.
        controls: the tokens after each control.
    """

    start: Float[Tensor, "b n d"]
    after: Float[Tensor, "b n d"]
    controls: dict[str, Float[Tensor, "b n d"]]


def measure_claims(
    net: nn.Module,
    views: Mapping[Tokens, Sequence[Any]],
    forward: Callable[[nn.Module, Any], object],
    *,
    seed: int = 0,
    quick: bool = False,
    pools: bool = True,
) -> dict[Place, LayerClaims]:
    """Measure every claim about every layer with attention in subspaces.

    Args:
        net: in `eval()` mode.
        views: batches of images, by what tokens the network sees of them.
        forward: runs the network on a batch.
        seed: of the random controls.
        quick: see `measure_layer`.
        pools: whether to measure claims about all images at once.

    Raises:
        UserError: if tokens are not finite.
    """
    found: dict[Place, LayerClaims] = {}
    for tokens, batches in views.items():
        for names, z in _entrances(net, batches, forward):
            for name in names:
                layer = net.get_submodule(name)
                part, number = place_of(name)
                measured, z = measure_layer(layer, z, name, seed=seed, quick=quick, pools=pools)
                theorems: frozenset[str] = getattr(layer, "theorems", frozenset())
                found[Place(tokens, part, number)] = LayerClaims(measured, theorems)  # pyright: ignore[reportArgumentType]
    return found


@torch.no_grad()
def measure_layer(
    layer: nn.Module,
    z: Float[Tensor, "b n d"],
    name: str = "blocks.0",
    *,
    seed: int = 0,
    quick: bool = False,
    pools: bool = True,
) -> tuple[dict[str, Measured], Float[Tensor, "b n d"]]:
    """All claims about one layer, and its output.

    Args:
        layer: of an encoder or a decoder, with attention in subspaces.
        z: the tokens that come into it.
        name: of the layer, for a message.
        seed: of the random controls.
        quick: measure image by image in the first of `GROUPS` groups of images alone, and pool without a jackknife.
        pools: whether to measure claims about all images at once.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = orthonormal_bases(1, z.shape[-1], z.shape[-1], generator)[0].to(z)
    is_decoder = isinstance(layer, DecoderLayer)
    values: dict[str, dict[str, list[Tensor]]] = {}
    sums: dict[_Sum, list[Tensor]] = {}
    outputs: list[Tensor] = []
    groups = z.tensor_split(min(GROUPS, len(z)))
    for number, group in enumerate(groups):
        points = {"z": group} | trace_layer(layer, group, ("z_half", "code", "z_next"))
        if not all(point.isfinite().all() for point in points.values()):
            raise not_finite(place_of(name), "its tokens")
        before, after = ("z_half", "z_next") if is_decoder else ("z", "z_half")
        moves = attention_moves(layer, points[before], points[after], rotation, generator)
        has_codes = not is_decoder and "code" in points
        if number == 0 or not quick:
            of_images = _subspace_rates(layer, moves) | (_sparse_coding(layer, points) if has_codes else {})
            for claim, of_claim in of_images.items():
                _append(values.setdefault(claim, {}), of_claim)
        if pools and not is_decoder:
            _append(sums, _sums_of_attention(moves) | (_sums_of_sparse_coding(layer, points) if has_codes else {}))
        outputs.append(points["z_next"])
    found = {claim: _per_image(claim, of_claim) for claim, of_claim in values.items()}
    counts = torch.tensor([len(group) * group.shape[1] for group in groups], dtype=torch.float64, device=z.device)
    if quick:
        sums, counts = {name: [torch.stack(of_groups).sum(0)] for name, of_groups in sums.items()}, counts.sum()[None]
    return found | _pooled(layer, sums, counts), torch.cat(outputs)


def attention_moves(
    layer: nn.Module,
    z: Float[Tensor, "b n d"],
    after: Float[Tensor, "b n d"],
    rotation: Float[Tensor, "d d"],
    generator: torch.Generator,
) -> Moves:
    """The attention step of a layer and what could replace it.

    | control          | the step is                                                       |
    |------------------|-------------------------------------------------------------------|
    | no change        | 0                                                                 |
    | flipped sign     | taken the other way                                               |
    | no mixing        | made with P = I: every token attends to itself alone              |
    | random move      | a random direction, of each token's own length                    |
    | random subspaces | made in Q U_k with a random rotation Q, of each token's own length |

    Args:
        layer: see `measure_layer`.
        z: the tokens in front of the attention's normalisation.
        after: those after the step.
        rotation: Q.
        generator: of the random moves.
    """
    attn, sign = attention_of(layer), -1 if isinstance(layer, DecoderLayer) else 1
    x = attention_norm(layer)(z)
    starting: Any = layer.step_start
    start = starting(z, x)
    step = after - start
    w, w_elsewhere = attn.project(x), attn.project(x @ rotation)
    elsewhere = attn.step(w_elsewhere, attn.membership(w_elsewhere) @ w_elsewhere) @ rotation.mT
    noise = torch.randn(step.shape, generator=generator).to(step)
    controls = {
        claims.NO_CHANGE: start,
        claims.FLIPPED: start - step,
        claims.NO_MIXING: start + sign * attn.step(w, w),
        claims.RANDOM_MOVE: start + _with_lengths_of(step, noise),
        claims.RANDOM_SUBSPACES: start + sign * _with_lengths_of(step, elsewhere),
    }
    return Moves(start, after, controls)


def _entrances(
    net: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], object]
) -> Iterator[tuple[list[str], Tensor]]:
    """The layers of each part, and the tokens of all images that come into the first of them."""
    parts: dict[str, list[str]] = {}
    for name, layer in layers_of(net).items():
        if has_subspaces(name, layer):
            parts.setdefault(place_of(name)[0], []).append(name)
    if not parts:
        return
    first = {part: names[0] for part, names in parts.items()}
    with torch.no_grad(), trace(net, [f"{name}.z" for name in first.values()]) as record:
        for batch in batches:
            forward(net, batch)
    for part, names in parts.items():
        yield names, torch.cat(record[f"{first[part]}.z"]).float()


def _subspace_rates(layer: nn.Module, moves: Moves) -> dict[str, dict[str, Tensor]]:
    """R^c of each image in its three forms, before the step, after it, and after its controls, by claim."""
    u, keys = bases(layer), _DECOMPRESS if isinstance(layer, DecoderLayer) else _COMPRESS
    found: dict[str, dict[str, Tensor]] = {key: {} for key in keys.values()}
    for name, tokens in {_AFTER: moves.after, **moves.controls}.items():
        for measure, rates in rates_in_subspaces(layer, tokens, u).items():
            found[keys[measure]][name] = rates
    for of_claim in found.values():
        of_claim[_BEFORE] = of_claim[claims.NO_CHANGE]
    return found


def _sparse_coding(layer: nn.Module, points: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Lasso, zeros and R of each image, likewise; relu(x) is a control where codes have the width of tokens."""
    ista: Any = layer.get_submodule("ista")
    x, code = layer.get_submodule("norm2")(points["z_half"]), points["code"]
    is_square = x.shape == code.shape
    codes = {_AFTER: code, claims.ZERO: torch.zeros_like(code)} | ({claims.RELU: x.relu()} if is_square else {})
    dictionary = ista.lasso_dictionary()
    lasso = {
        name: torch.stack([lasso_objective(a, x_i, dictionary, ista.threshold) for a, x_i in zip(c, x, strict=True)])
        for name, c in codes.items()
    }
    lasso[_BEFORE] = lasso[claims.ZERO]
    found = {claims.LASSO_ZERO: {name: lasso[name] for name in (_BEFORE, _AFTER, claims.ZERO)}}
    if is_square:
        zeros = {name: (codes[name] == 0).float().mean((1, 2)) for name in (_AFTER, claims.RELU)}
        found |= {claims.LASSO: lasso, claims.SPARSITY: zeros | {_BEFORE: zeros[claims.RELU]}}
    for claim, tokens in _expansions(layer, points).items():
        rates = {name: coding_rate(equal_lengths(found_tokens), EPS) for name, found_tokens in tokens.items()}
        found[claim] = rates | {claims.NO_CHANGE: rates[_BEFORE]}
    return found


def _expansions(layer: nn.Module, points: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tokens before and after ISTA and the whole layer, and with relu(x) in the place of ISTA."""
    x = layer.get_submodule("norm2")(points["z_half"])
    ista = {_BEFORE: x, _AFTER: points["code"]}
    whole = {_BEFORE: points["z"], _AFTER: points["z_next"]}
    if x.shape != points["code"].shape:
        return {claims.EXPAND_LAYER: whole}
    relu = x.relu()
    ista[claims.RELU] = relu
    whole[claims.RELU] = points["z_half"] + relu if getattr(layer, "ista_skip", False) else relu
    return {claims.EXPAND: ista, claims.EXPAND_LAYER: whole}


def _sums_of_attention(moves: Moves) -> dict[_Sum, Tensor]:
    return {
        (claims.SORT, _BEFORE): pooled.token_sum(moves.start),
        (claims.SORT, _MEANS): pooled.mean_sum(moves.start),
        (claims.SORT, _AFTER): pooled.token_sum(moves.after),
    }


def _sums_of_sparse_coding(layer: nn.Module, points: Mapping[str, Tensor]) -> dict[_Sum, Tensor]:
    return {
        (claim, name): pooled.token_sum(equal_lengths(tokens))
        for claim, found in _expansions(layer, points).items()
        for name, tokens in found.items()
    }


def _pooled(layer: nn.Module, sums: Mapping[_Sum, list[Tensor]], counts: Float[Tensor, "g"]) -> dict[str, Measured]:
    """The claims about all images at once, of what sums there are."""
    if not sums:
        return {}
    q = orthonormalised(bases(layer).double())
    pools = {name: pooled.pool(found, counts, q) for name, found in sums.items()}
    found = {claims.SORT: pooled.sorting(*(pools[claims.SORT, name] for name in (_BEFORE, _MEANS, _AFTER)))}
    pairs = {claims.EXPAND: claims.EXPAND_REDUCTION, claims.EXPAND_LAYER: claims.EXPAND_REDUCTION_LAYER}
    for expansion, claim in pairs.items():
        if (expansion, _BEFORE) in pools:
            before, after = (pools[expansion, name] for name in (_BEFORE, _AFTER))
            found[claim] = pooled.reduction(before, after, pools.get((expansion, claims.RELU)))
    return {claim: Measured(*map(_on_cpu, measured)) for claim, measured in found.items()}


def _per_image(claim: str, values: Mapping[str, list[Tensor]]) -> Measured:
    whole = {name: torch.cat(found).cpu().double() for name, found in values.items()}
    controls = {name: whole[name] for name in claims.CLAIMS[claim].controls if name in whole}
    margins = margins_over(claims.CLAIMS[claim].sign, whole[_AFTER], controls)
    return Measured(whole[_BEFORE], whole[_AFTER], margins, whole[_BEFORE])


def _on_cpu(values: Any) -> Any:
    return {k: v.cpu() for k, v in values.items()} if isinstance(values, Mapping) else values.cpu()


def _append(lists: dict[_Key, list[Tensor]], values: Mapping[_Key, Tensor]) -> None:
    for name, value in values.items():
        lists.setdefault(name, []).append(value)


def _with_lengths_of(step: Float[Tensor, "b n d"], direction: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Directions with the lengths of the step, token by token."""
    return torch.nn.functional.normalize(direction, dim=-1) * step.norm(dim=-1, keepdim=True)
