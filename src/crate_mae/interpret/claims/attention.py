"""Claim 2: attention comes from a gradient step on the subspace coding rate, expanded to first order.

The descent step has two terms: -W, which shrinks tokens, and +P W, which mixes them. The published layer keeps only the
second. Both are measured here: the step with both terms ("restored") and the published step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from crate_mae.drawing.style import GREY, legend_above, new_figure, panels
from crate_mae.interpret.claims.common import (
    Section,
    Spread,
    cosine,
    draw_spreads,
    generator,
    number,
    relative_error,
    spreads,
)
from crate_mae.theory import (
    coherence,
    official_subspace_coding_rate,
    orthonormal_bases,
    project,
    sample_mixture,
    ssa,
    subspace_coding_rate,
    subspace_coding_rate_gradient,
    unproject,
)
from crate_mae.theory.subspaces import orthonormal_columns

RADII = (0.01, 0.03, 0.1, 0.3, 0.9, 3.0, 10.0)
ORDERS = (0, 1, 2)
SCALES = {"s = 1": 1.0, "s = p^-1/2": None}
STEP_LENGTH = 0.1  # of the steps whose change of R^c is compared, relative to the norm of the tokens
ACCURATE = 0.05  # relative error up to which the report calls an approximation accurate
_D, _H, _P, _TOKENS, _NOISE = 32, 4, 8, 128, 0.2


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """How well the approximations match the gradient, over draws.

    Attributes:
        radius: a max_k ||W_k||^2, which must be below 1 for the series to converge.
        error: relative error of each approximation; of the softmax forms after scaling by the best factor.
        cosine: between each approximation and the exact gradient.
        mixing: cosine between the parts that mix tokens: a W_k minus the exact gradient, and its approximation.
        descent: cosine between the exact descent direction, -grad R^c, and each step of `softmax_steps`.
        change: relative change of R^c by each step and by the exact one, all of the same length.
        official_change: the same for R^c as the official code computes it, which ignores the length of projections.
        coherence: of the subspaces.
    """

    radius: float
    error: dict[str, Spread]
    cosine: dict[str, Spread]
    mixing: dict[str, Spread]
    descent: dict[str, Spread]
    change: dict[str, Spread]
    official_change: dict[str, Spread]
    coherence: Spread


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The approximations on orthogonal and on slightly coherent subspaces."""

    draws: int
    d: int
    h: int
    p: int
    tokens: int
    noise_std: float
    orthogonal: tuple[AttentionPoint, ...]
    coherent: tuple[AttentionPoint, ...]


def measure(seed: int = 0, draws: int = 5, *, radii: Sequence[float] = RADII) -> Attention:
    """Vary the distortion, which decides how fast the series converges; for orthogonal and for tilted subspaces."""

    def point(radius: float, tilt: float) -> AttentionPoint:
        rows, coherences = zip(*(_measure_draw(seed, draw, radius, tilt) for draw in range(draws)), strict=True)
        measures = {name: spreads([row[name] for row in rows]) for name in rows[0]}
        return AttentionPoint(radius=radius, coherence=Spread.of(coherences), **measures)

    return Attention(
        draws=draws,
        d=_D,
        h=_H,
        p=_P,
        tokens=_TOKENS,
        noise_std=_NOISE,
        orthogonal=tuple(point(radius, 0.0) for radius in radii),
        coherent=tuple(point(radius, 0.03) for radius in radii),
    )


def tilt_bases(u: Float[Tensor, "h d p"], tilt: float, source: torch.Generator) -> Float[Tensor, "h d p"]:
    """Add `tilt` times Gaussian noise to bases and make each orthonormal again, so that subspaces become coherent."""
    noise = torch.randn(u.shape, generator=source, dtype=u.dtype)
    return orthonormal_columns(u + tilt * noise)


def softmax_steps(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"]) -> dict[str, Float[Tensor, "n d"]]:
    r"""Steps with the softmax in place of the auto-correlation, for both scales.

    Restored: sum_k (P_k W_k - W_k) U_k^T, the two terms of the descent step. Published: sum_k P_k W_k U_k^T, which is
    MSSA with tied projections.
    """
    w = project(z, u)
    steps = {}
    for name, scale in SCALES.items():
        attended = ssa(w, scale)
        steps |= {f"restored, {name}": unproject(attended - w, u), f"published, {name}": unproject(attended, u)}
    return steps


def _measure_draw(seed: int, draw: int, radius: float, tilt: float) -> tuple[dict[str, dict[str, float]], float]:
    """The measures of `AttentionPoint` by their names, and the coherence."""
    source = generator(seed, draw)
    u = tilt_bases(orthonormal_bases(_H, _D, _P, source), tilt, source)
    z = sample_mixture(_TOKENS, u, _NOISE, source).tokens
    w = project(z, u)
    a = radius / torch.linalg.matrix_norm(w, ord=2).amax().item() ** 2
    eps = (_P / (_TOKENS * a)) ** 0.5
    exact = subspace_coding_rate_gradient(z, u, eps)
    series = {f"order {m}": subspace_coding_rate_gradient(z, u, eps, neumann_order=m) for m in ORDERS}
    # The gradient with softmax(s W W^T) in place of a W W^T.
    steps = softmax_steps(z, u)
    softmax = {f"softmax, {name}": -a * steps[f"restored, {name}"] for name in SCALES}
    forms = series | softmax
    # Every form begins with a W_k, which only shrinks. The part that mixes tokens is what a form subtracts from it.
    shrinking = a * unproject(w, u)
    moved = {name: _move(z, step) for name, step in {"gradient": -exact, **steps}.items()}
    rate, official_rate = subspace_coding_rate(z, u, eps), official_subspace_coding_rate(w)
    measures = {
        "error": {name: relative_error(x, exact) for name, x in series.items()}
        | {name: relative_error(_best_factor(x, exact) * x, exact) for name, x in softmax.items()},
        "cosine": {name: cosine(x, exact) for name, x in forms.items()},
        "mixing": {name: cosine(shrinking - x, shrinking - exact) for name, x in forms.items() if name != "order 0"},
        "descent": {name: cosine(step, -exact) for name, step in steps.items()},
        "change": {name: _change(subspace_coding_rate(x, u, eps), rate) for name, x in moved.items()},
        "official_change": {
            name: _change(official_subspace_coding_rate(project(x, u)), official_rate) for name, x in moved.items()
        },
    }
    return measures, coherence(u).item()


def _move(z: Tensor, step: Tensor) -> Tensor:
    return z + STEP_LENGTH * torch.linalg.vector_norm(z) / torch.linalg.vector_norm(step) * step


def _change(after: Tensor, before: Tensor) -> float:
    return (after / before - 1).item()


def _best_factor(x: Tensor, exact: Tensor) -> Tensor:
    return (x * exact).sum() / x.square().sum()


def draw(results: Attention) -> Figure:
    """Draw the errors of the series, the direction of the part that mixes tokens, and the direction of whole steps."""
    figure = new_figure(14.0, 4.8)
    axes = panels(figure, 1, 3)[0]
    names = ["order 0", "order 1", "order 2", "softmax, s = 1", "softmax, s = p^-1/2"]
    for points, line in ((results.orthogonal, "-"), (results.coherent, "--")):
        x = [point.radius for point in points]
        for panel, measure, drawn in zip(
            axes, ("error", "mixing", "descent"), (names, names[1:], list(points[0].descent)), strict=True
        ):
            for name in drawn:
                index = (drawn if measure == "descent" else names).index(name)
                label = name.replace("p^-1/2", "p$^{-1/2}$") if line == "-" else "_"
                draw_spreads(
                    panel, x, [getattr(point, measure)[name] for point in points], index, label, linestyle=line
                )
    for panel in axes:
        panel.set_xscale("log")
        panel.set_xlabel("a max ‖W$_k$‖² (the series converges below 1)")
        panel.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-5, 1e3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[1].set_ylabel("cosine of the part that mixes tokens")
    axes[1].set_title("solid: orthogonal subspaces; dashed: slightly coherent", color=GREY)
    axes[2].set_ylabel("cosine of the step with −∇R$^c$")
    axes[2].set_ylim(-1.05, 1.05)
    axes[2].axhline(0, color=GREY, linewidth=1)
    axes[2].legend(frameon=False, loc="center right")
    legend_above(figure, axes[0], 5)
    return figure


def explain(results: Attention) -> Section:
    """Describe how attention comes from the gradient step, and what it leaves out."""

    def at(points: tuple[AttentionPoint, ...], radius: float) -> AttentionPoint:
        return min(points, key=lambda point: abs(point.radius - radius))

    near, edge, beyond = (at(results.orthogonal, radius) for radius in (0.3, 0.9, 3.0))
    tilted = at(results.coherent, 0.3)
    one, network = SCALES
    scale = "s = p^−1/2"
    accurate = [point.radius for point in results.orthogonal if point.error["order 1"].mean <= ACCURATE]
    reach = f"up to a‖W‖² = {max(accurate):g}" if accurate else "nowhere"
    downhill = {
        kind: sum(point.descent[f"{kind}, {network}"].mean > 0 for point in results.orthogonal)
        for kind in ("restored", "published")
    }

    def both(values: dict[str, Spread], kind: str) -> str:
        return f"{number(values[f'{kind}, {one}'])} for s = 1 and {number(values[f'{kind}, {network}'])} for {scale}"

    def orders(point: AttentionPoint) -> str:
        return ", ".join(number(point.error[f"order {m}"]) for m in ORDERS)

    return Section(
        title="Attention keeps one of the two terms of the gradient step",
        claim="Expand the inverse in the gradient to first order, and attention without softmax appears. The descent "
        "step then has two terms: −W, which shrinks tokens, and a term that mixes them. Replace the auto-correlation W "
        "W^⊤ by a softmax P, and the second term becomes PW, the network's attention. The published layer "
        "adds PW and drops −W.",
        formula="∇R^c = a Σ_k (I + a W_k W_k^⊤)^−1 W_k U_k^⊤ ≈ a Σ_k (W_k − a W_k W_k^⊤ W_k) U_k^⊤ ≈ a Σ_k "
        "(W_k − P_k W_k) U_k^⊤, with P_k = softmax(s W_k W_k^⊤)\n"
        "restored step: Z + κ Σ_k (P_k W_k − W_k) U_k^⊤\n"
        "published step: Z + Σ_k P_k W_k U_k^⊤",
        how=f"{results.tokens} noisy tokens (σ = {results.noise_std:g}) from {results.h} subspaces of dimension "
        f"{results.p}; {results.draws} draws. The distortion sets a‖W‖²; the series converges below 1. The softmax "
        "forms were scaled by the best factor, in their favour. Because every form begins with the same shrinking "
        "term, the part that mixes tokens is also compared alone. Subspaces: orthogonal, and tilted to a coherence of "
        f"{number(tilted.coherence)}. The restored and the published step are compared with the exact descent "
        f"direction; for the change of R^c all steps were scaled to {STEP_LENGTH:g} of the tokens' norm. "
        "Here the published step has the projections U_k and tokens that are not normalised; the network "
        "has learned projections and normalised tokens.",
        found=(
            f"Relative errors of the orders 0, 1, 2 at a‖W‖² = {near.radius:g}: {orders(near)}; at {edge.radius:g}: "
            f"{orders(edge)}.",
            f"With softmax, W − PW at a‖W‖² = {near.radius:g}: relative error {both(near.error, 'softmax')}. The part "
            f"that mixes tokens has a cosine with the gradient's of {both(near.mixing, 'softmax')}.",
            f"Cosine with −∇R^c at the same a‖W‖²: restored step {both(near.descent, 'restored')}; published "
            f"step {both(near.descent, 'published')}. With {scale} the restored step points downhill at "
            f"{downhill['restored']} of {len(results.orthogonal)} distortions, the published one at "
            f"{downhill['published']}.",
            f"Steps of the same length change R^c by these shares: exact gradient "
            f"{number(near.change['gradient'])}; restored {both(near.change, 'restored')}; published "
            f"{both(near.change, 'published')}. R^c as the official code computes it, with every projection "
            f"scaled to length 1, changes by: restored {both(near.official_change, 'restored')}; published "
            f"{both(near.official_change, 'published')}.",
            f"Slight coherence changes little: order 1 then has error {number(tilted.error['order 1'])}, and softmax "
            f"with {scale} {number(tilted.error[f'softmax, {network}'])}.",
        ),
        limits=(
            f"Beyond a‖W‖² = 1 the series is useless: at {beyond.radius:g}, order 1 has relative error "
            f"{number(beyond.error['order 1'])} and cosine {number(beyond.cosine['order 1'])}.",
            "The published step does not lower R^c of the tokens as they are: it lengthens a token's part in "
            "every subspace, and the gradient shortens it. Measured without regard to length, or after a "
            "normalisation, it can still compress.",
            "The softmax is a poor approximation of the gradient's value: its errors are "
            f"{number(near.error[f'softmax, {one}'])} and {number(near.error[f'softmax, {network}'])}, and plain "
            f"shrinking (order 0) has {number(near.error['order 0'])}. Its purpose is another: it replaces similarity "
            "by membership, and the first and third claim show that membership is what cleans tokens.",
        ),
        glance=f"First order is accurate (error at most {ACCURATE}) {reach}. With the softmax ({scale}) the step "
        f"with both terms has a cosine of {number(near.descent[f'restored, {network}'])} with the descent direction; "
        f"the published step, without −W, has {number(near.descent[f'published, {network}'])}.",
        caption="Left: relative error of the whole gradient. Middle: cosine of the part that mixes tokens. Right: "
        "cosine of the steps with the descent direction, −∇R^c; below 0 a step goes uphill.",
    )
