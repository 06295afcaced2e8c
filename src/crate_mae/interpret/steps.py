r"""The claims of the audit in numbers: each layer's steps and their controls, on the tokens of the same images.

A network is walked layer by layer with the tokens of all images at hand, so that what is pooled over images needs one
pass, and of one layer at a time.

Some rates are those of the tokens of all images together. The tokens of one image are fewer than the dimensions of a
layer, so that R of an image is capped at n directions while R^c counts p directions in each of h subspaces: R - R^c of
an image means little. The tokens of many images fill the space. Their rates are those of the moment M = Z^T Z / n
(`theory.coding_rate.moment_coding_rate`):

    R = 1/2 logdet(I + d/eps^2 M),    R^c = 1/2 sum_k logdet(I + p/eps^2 Q_k^T M Q_k),

with orthonormal bases Q_k of the layer's subspaces, so that no scale of U_k enters. Moments of groups of images add up,
which gives a jackknife: a `Pool` holds the moments of all groups first, then without each of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.interpret import audit as claims
from crate_mae.interpret.audit import Measured, MeasuredStep, Tokens, margins_over
from crate_mae.interpret.layer_measures import (
    EPS,
    Forward,
    attention_norm,
    attention_of,
    bases,
    default_pass,
    equal_lengths,
    has_subspaces,
    rates_in_subspaces,
)
from crate_mae.interpret.statistics import not_finite, place_of
from crate_mae.models.layers import DecoderLayer
from crate_mae.models.tracing import layers_of, trace, trace_layer
from crate_mae.theory.coding_rate import coding_rate, moment_coding_rate
from crate_mae.theory.sparse_coding import lasso_objective
from crate_mae.theory.subspaces import orthonormal_bases, orthonormalised, project

GROUPS = 10  # of images, for the jackknife of pooled claims
# Claims by the measure that they are about.
_RATES = {  # claims of the encoder and of the decoder
    "subspace_rate": (claims.COMPRESS, claims.DECOMPRESS),
    "subspace_rate_normalised": (claims.COMPRESS_NORMALISED, claims.DECOMPRESS_NORMALISED),
    "subspace_rate_unit": (claims.COMPRESS_UNIT, claims.DECOMPRESS_UNIT),
}
_BEFORE, _AFTER, _MEANS = "before", "after", "means"
_DOUBLINGS, _HALVINGS = 40, 26  # of a bisection: to 1e-8 of the factor

_Key = TypeVar("_Key")
_Sum = tuple[str, str]  # a claim, and which tokens are summed


class Pool(NamedTuple):
    """Moments of the tokens of all images, then without each group of images.

    Attributes:
        whole: M.
        inside: Q_k^T M Q_k.
    """

    whole: Float[Tensor, "r d d"]
    inside: Float[Tensor, "r h p p"]

    def rate(self) -> Float[Tensor, "r"]:
        """R."""
        return moment_coding_rate(self.whole, EPS)

    def subspace_rate(self) -> Float[Tensor, "r"]:
        """R^c."""
        return moment_coding_rate(self.inside, EPS).sum(-1)

    def times_plus(self, b: Float[Tensor, "r"], other: "Pool") -> "Pool":
        """Every moment b M + M', with those of another pool."""
        whole, inside = b[:, None, None] * self.whole, b[:, None, None, None] * self.inside
        return Pool(whole + other.whole, inside + other.inside)


def measure_claims(
    net: nn.Module,
    views: Mapping[Tokens, Sequence[Any]],
    forward: Forward = default_pass,
    *,
    seed: int = 0,
    quick: bool = False,
    pools: bool = True,
) -> dict[MeasuredStep, dict[str, Measured]]:
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
    found: dict[MeasuredStep, dict[str, Measured]] = {}
    for tokens, batches in views.items():
        for names, z in _entrances(net, batches, forward):
            for name in names:
                layer = net.get_submodule(name)
                part, number = place_of(name)
                measured, z = measure_layer(layer, z, name, seed=seed, quick=quick, pools=pools)
                found[MeasuredStep(tokens, part, number)] = measured
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
        controls = attention_controls(layer, points[before], points[after], rotation, generator)
        has_codes = not is_decoder and "code" in points
        if number == 0 or not quick:
            of_images = _subspace_rates(layer, points[after], controls)
            of_images |= _sparse_coding(layer, points) if has_codes else {}
            for claim, of_claim in of_images.items():
                _append(values.setdefault(claim, {}), of_claim)
        if pools and not is_decoder:
            expansions = _expansions(layer, points) if has_codes else {}
            _append(sums, _sums(controls[claims.NO_CHANGE], points[after], expansions))
        outputs.append(points["z_next"])
    found = {claim: _per_image(claim, of_claim) for claim, of_claim in values.items()}
    counts = torch.tensor([len(group) * group.shape[1] for group in groups], dtype=torch.float64, device=z.device)
    if quick:
        sums, counts = {name: [torch.stack(of_groups).sum(0)] for name, of_groups in sums.items()}, counts.sum()[None]
    found |= _pooled(layer, sums, counts)
    theorems: frozenset[str] = getattr(layer, "theorems", frozenset())
    return {key: each._replace(is_theorem=key in theorems) for key, each in found.items()}, torch.cat(outputs)


def attention_controls(
    layer: nn.Module,
    z: Float[Tensor, "b n d"],
    after: Float[Tensor, "b n d"],
    rotation: Float[Tensor, "d d"],
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "b n d"]]:
    """The tokens after what could replace the attention step of a layer.

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
    start = x if layer.starts_from_norm else z
    step = after - start
    w, w_elsewhere = attn.project(x), attn.project(x @ rotation)
    elsewhere = attn.step(w_elsewhere, attn.membership(w_elsewhere) @ w_elsewhere) @ rotation.mT
    noise = torch.randn(step.shape, generator=generator).to(step)
    return {
        claims.NO_CHANGE: start,
        claims.FLIPPED: start - step,
        claims.NO_MIXING: start + sign * attn.step(w, w),
        claims.RANDOM_MOVE: start + _with_lengths_of(step, noise),
        claims.RANDOM_SUBSPACES: start + sign * _with_lengths_of(step, elsewhere),
    }


def _entrances(net: nn.Module, batches: Sequence[Any], forward: Forward) -> Iterator[tuple[list[str], Tensor]]:
    """The layers of each part, and the tokens of all images that come into the first of them."""
    parts: dict[str, list[str]] = {}
    for name, layer in layers_of(net).items():
        if has_subspaces(layer):
            parts.setdefault(place_of(name)[0], []).append(name)
    if not parts:
        return
    first = {part: names[0] for part, names in parts.items()}
    with torch.no_grad(), trace(net, [f"{name}.z" for name in first.values()]) as record:
        for batch in batches:
            forward(net, batch)
    for part, names in parts.items():
        yield names, torch.cat(record[f"{first[part]}.z"]).float()


def _subspace_rates(layer: nn.Module, after: Tensor, controls: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """R^c of each image in its three forms, before the step, after it, and after its controls, by claim."""
    u, is_decoder = bases(layer), isinstance(layer, DecoderLayer)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tokens in {_AFTER: after, **controls}.items():
        for measure, rates in rates_in_subspaces(layer, tokens, u).items():
            found.setdefault(_RATES[measure][is_decoder], {})[name] = rates
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
    """Tokens before and after ISTA and the whole layer, and with relu(x) instead of ISTA."""
    x = layer.get_submodule("norm2")(points["z_half"])
    ista = {_BEFORE: x, _AFTER: points["code"]}
    whole = {_BEFORE: points["z"], _AFTER: points["z_next"]}
    if x.shape != points["code"].shape:
        return {claims.EXPAND_LAYER: whole}
    relu = x.relu()
    ista[claims.RELU] = relu
    whole[claims.RELU] = points["z_half"] + relu if getattr(layer, "ista_skip", False) else relu
    return {claims.EXPAND: ista, claims.EXPAND_LAYER: whole}


def _sums(start: Tensor, after: Tensor, expansions: Mapping[str, Mapping[str, Tensor]]) -> dict[_Sum, Tensor]:
    """Sums over the tokens of some images, for what is pooled over all."""
    found = {(claims.SORT, _BEFORE): token_sum(start), (claims.SORT, _AFTER): token_sum(after)}
    found[claims.SORT, _MEANS] = mean_sum(start)
    for claim, of_claim in expansions.items():
        found |= {(claim, name): token_sum(equal_lengths(tokens)) for name, tokens in of_claim.items()}
    return found


def _pooled(layer: nn.Module, sums: Mapping[_Sum, list[Tensor]], counts: Float[Tensor, "g"]) -> dict[str, Measured]:
    """The claims about all images at once, of what sums there are."""
    if not sums:
        return {}
    q = orthonormalised(bases(layer).double())
    pools = {name: pool(found, counts, q) for name, found in sums.items()}
    found = {claims.SORT: sorting(*(pools[claims.SORT, name] for name in (_BEFORE, _MEANS, _AFTER)))}
    pairs = {claims.EXPAND: claims.EXPAND_REDUCTION, claims.EXPAND_LAYER: claims.EXPAND_REDUCTION_LAYER}
    for expansion, claim in pairs.items():
        if (expansion, _BEFORE) in pools:
            before, after = pools[expansion, _BEFORE], pools[expansion, _AFTER]
            found[claim] = reduction(before, after, pools.get((expansion, claims.RELU)))
    return found


def _per_image(claim: str, values: Mapping[str, list[Tensor]]) -> Measured:
    whole = {name: torch.cat(found).cpu().double() for name, found in values.items()}
    controls = {name: whole[name] for name in claims.CLAIMS[claim].controls if name in whole}
    margins = margins_over(claims.CLAIMS[claim].sign, whole[_AFTER], controls)
    return Measured(whole[_BEFORE], whole[_AFTER], margins, whole[_BEFORE])


def _append(lists: dict[_Key, list[Tensor]], values: Mapping[_Key, Tensor]) -> None:
    for name, value in values.items():
        lists.setdefault(name, []).append(value)


def _with_lengths_of(step: Float[Tensor, "b n d"], direction: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Directions with the lengths of the step, token by token."""
    return torch.nn.functional.normalize(direction, dim=-1) * step.norm(dim=-1, keepdim=True)


def token_sum(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "d d"]:
    """Z^T Z of all tokens of some images, in float64."""
    z = tokens.flatten(0, 1).double()
    return z.mT @ z


def mean_sum(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "d d"]:
    """The same after every token was replaced by the mean token of its image."""
    z = tokens.double().mean(1)
    return tokens.shape[1] * z.mT @ z


def pool(sums: Sequence[Float[Tensor, "d d"]], counts: Float[Tensor, "g"], q: Float[Tensor, "h d p"]) -> Pool:
    """The moments of groups of images, from their sums and numbers of tokens; of a single group, without replicates."""
    groups = torch.stack(list(sums))
    return Pool(_replicates(groups, counts), _replicates(q.mT @ project(groups, q), counts))


def reduction(before: Pool, after: Pool, relu: Pool | None) -> Measured:
    """R - R^c before and after a step, against no change and, where there is such a control, relu(x)."""
    start, end = (found.rate() - found.subspace_rate() for found in (before, after))
    controls = {claims.NO_CHANGE: start} | ({} if relu is None else {claims.RELU: relu.rate() - relu.subspace_rate()})
    return Measured(start, end, margins_over(1, end, controls), before.rate())


def sorting(before: Pool, means: Pool, after: Pool) -> Measured:
    r"""By how much R falls less in a step than in two moves that sort nothing, at the step's own R^c.

    Both multiply a moment by b >= 0: all of it, or that of the tokens' differences from the mean token of their image:

        plain shrinking:    M(b) = b M,
        uniform attention:  M(b) = b (M - M_mean) + M_mean,    Z <- (1 - a) Z + a 1 1^T Z / n with b = (1 - a)^2.

    R^c rises with b in both, and b is found by bisection. A step that does not lower R^c does not sort: against "no
    change", its margin is the fall of R^c itself.

    Args:
        before: the tokens before the step.
        means: each of them replaced by the mean token of its image.
        after: the tokens after the step.
    """
    target = after.subspace_rate()
    minus = -torch.ones_like(target)
    averaged = _with_subspace_rate(means.times_plus(minus, before), means, target)
    shrunk = _with_subspace_rate(before, means.times_plus(minus, means), target)
    start, end = before.rate(), after.rate()
    controls = {claims.UNIFORM: averaged.rate(), claims.SHRINKING: shrunk.rate()}
    margins = {claims.NO_CHANGE: before.subspace_rate() - target} | margins_over(1, end, controls)
    return Measured(start, end, margins, start)


def _replicates(sums: Float[Tensor, "g *shape"], counts: Float[Tensor, "g"]) -> Float[Tensor, "r *shape"]:
    """Means over all groups, then without each."""
    counts = counts.view(-1, *[1] * (sums.ndim - 1))
    whole, count = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
    if len(sums) < 2:
        return whole / count
    return torch.cat([whole / count, (whole - sums) / (count - counts)])


def _with_subspace_rate(varied: Pool, fixed: Pool, target: Float[Tensor, "r"]) -> Pool:
    """The pool b `varied` + `fixed` whose R^c is the target, b >= 0; b = 0 where even that has a larger R^c."""

    def is_low(b: Tensor) -> Tensor:
        inside = b[:, None, None, None] * varied.inside + fixed.inside
        return moment_coding_rate(inside, EPS).sum(-1) < target

    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(_DOUBLINGS):
        if not (grows := is_low(high)).any():
            break
        high = torch.where(grows, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = is_low(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return varied.times_plus(high, fixed)
