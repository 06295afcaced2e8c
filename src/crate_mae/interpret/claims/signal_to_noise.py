"""Claim 3: every attention layer raises the signal-to-noise ratio by a constant factor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from crate_mae.drawing.style import GREY, colour, legend_above, marker, new_figure, panels
from crate_mae.drawing.templates import Table
from crate_mae.drawing.text import html
from crate_mae.interpret.claims.common import Section, Spread, generator, span, spreads_by_step
from crate_mae.theory import (
    attention_membership,
    orthonormal_bases,
    project,
    sample_mixture,
    signal_to_noise,
    unproject,
)

NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
HOLDS_WITHIN = 0.05  # relative distance from the predicted factor up to which it holds
Operator = Literal["threshold", "normalised", "softmax", "network"]
# each operator with its title in the figure and in the table
OPERATORS: dict[Operator, tuple[str, str]] = {
    "threshold": ("thresholded softmax, s = 1", "thresholded"),
    "normalised": ("thresholded, tokens normalised", "thresholded, normalised"),
    "softmax": ("softmax, s = 1", "softmax, s = 1"),
    "network": ("softmax, s = p$^{-1/2}$ (the network's)", "softmax, s = p^−1/2"),
}
_D, _H, _P, _TOKENS = 128, 4, 32, 160
_STEP_SIZE, _THRESHOLD = 0.5, 0.6  # eta, tau


@dataclass(frozen=True, kw_only=True)
class SignalToNoiseCurve:
    """One operator at one noise level.

    Attributes:
        operator: see `attention_layer`.
        noise_std: sigma.
        ratio: SNR of a cluster's tokens before the first layer and after each, averaged over clusters.
        factor: the factor by which each layer multiplies it, over draws.
        predicted: the theorem's factor.
        layers_held: number of layers, from the first, with a mean factor within `HOLDS_WITHIN` of the predicted one.
        layers_grown: number of layers, from the first, with a mean factor above 1.
    """

    operator: Operator
    noise_std: float
    ratio: tuple[Spread, ...]
    factor: tuple[Spread, ...]
    predicted: float
    layers_held: int
    layers_grown: int


@dataclass(frozen=True, kw_only=True)
class SignalToNoise:
    """Curves of all operators and noise levels, with their common setting."""

    draws: int
    d: int
    h: int
    p: int
    tokens: int
    layers: int
    step_size: float
    threshold: float
    curves: tuple[SignalToNoiseCurve, ...]


def measure(seed: int = 0, draws: int = 5, *, noise: Sequence[float] = NOISE, layers: int = 8) -> SignalToNoise:
    r"""Apply layers Z <- Z + eta sum_k phi(W_k W_k^T) W_k U_k^T to noisy tokens, with every operator phi.

    If phi gives every token tau on itself in its own subspace and nothing elsewhere, the part inside the token's own
    subspace grows by 1 + eta tau and the part outside stays. That is the theorem's argument, and its factor.
    """
    return SignalToNoise(
        draws=draws,
        d=_D,
        h=_H,
        p=_P,
        tokens=_TOKENS,
        layers=layers,
        step_size=_STEP_SIZE,
        threshold=_THRESHOLD,
        curves=tuple(_curve(seed, draws, layers, operator, noise_std) for operator in OPERATORS for noise_std in noise),
    )


def attention_layer(
    z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], operator: Operator, step_size: float, threshold: float
) -> Float[Tensor, "n d"]:
    r"""Z + eta sum_k phi(W_k W_k^T) W_k U_k^T.

    "threshold" is the theorem's phi = tau [softmax > tau], elementwise, with s = 1; "normalised" the same for tokens
    scaled to norm sqrt(p), as layer normalisation scales them in a network; "softmax" the softmax itself with s = 1;
    and "network" the softmax with s = p^-1/2, as in `mssa`.
    """
    w = project(z, u)
    seen = project(u.shape[-1] ** 0.5 * F.normalize(z, dim=-1), u) if operator == "normalised" else w
    membership = attention_membership(seen, None if operator == "network" else 1.0)
    if operator in ("threshold", "normalised"):
        membership = threshold * (membership > threshold).to(z.dtype)
    return z + step_size * unproject(membership @ w, u)


def _curve(seed: int, draws: int, layers: int, operator: Operator, noise_std: float) -> SignalToNoiseCurve:
    runs = []
    for draw in range(draws):
        source = generator(seed, draw)
        u = orthonormal_bases(_H, _D, _P, source)
        sample = sample_mixture(_TOKENS, u, noise_std, source)
        states = [sample.tokens]
        for _ in range(layers):
            states.append(attention_layer(states[-1], u, operator, _STEP_SIZE, _THRESHOLD))
        runs.append([_ratio(z, sample.labels, u) for z in states])
    factor = spreads_by_step([[after / before for before, after in pairwise(run)] for run in runs])
    predicted = 1 + _STEP_SIZE * (_THRESHOLD if operator in ("threshold", "normalised") else 1.0)
    return SignalToNoiseCurve(
        operator=operator,
        noise_std=noise_std,
        ratio=spreads_by_step(runs),
        factor=factor,
        predicted=predicted,
        layers_held=_count_leading(abs(layer.mean / predicted - 1) <= HOLDS_WITHIN for layer in factor),
        layers_grown=_count_leading(layer.mean > 1 for layer in factor),
    )


def _ratio(z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], u: Float[Tensor, "h d p"]) -> float:
    """The ratio, averaged over the clusters that have tokens."""
    each = [signal_to_noise(z[labels == k], u)[k] for k in labels.unique()]
    return torch.stack(each).mean().item()


def _count_leading(values: Iterable[bool]) -> int:
    """The number of true values before the first false one."""
    return sum(1 for _ in takewhile(bool, values))


def draw(results: SignalToNoise) -> Figure:
    """Draw the growth of the ratio through the layers, with a panel for each operator."""
    figure = new_figure(11.0, 7.0)
    axes = panels(figure, 2, 2, sharex=True, sharey=True).ravel()
    layers = range(results.layers + 1)
    for panel, (operator, (title, _)) in zip(axes, OPERATORS.items(), strict=True):
        curves = [curve for curve in results.curves if curve.operator == operator]
        for index, curve in enumerate(curves):
            growth = [ratio.mean / curve.ratio[0].mean for ratio in curve.ratio]
            style = {"color": colour(index), "marker": marker(index)}
            panel.plot(layers, growth, label=f"$\\sigma$ = {curve.noise_std:g}", markersize=5, **style)
        predicted = [curves[0].predicted ** layer for layer in layers]
        panel.plot(layers, predicted, color=GREY, linestyle="--", linewidth=2.2, label="predicted", zorder=1)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(f"{title}; predicted {curves[0].predicted:.2f} a layer")
    for panel in axes[2:]:
        panel.set_xlabel("layer")
    for panel in axes[::2]:
        panel.set_ylabel("SNR / SNR at the start")
    legend_above(figure, axes[0], 8 if len(axes[0].lines) <= 8 else 5)
    return figure


def explain(results: SignalToNoise) -> Section:
    """Describe whether every layer improves the signal-to-noise ratio by the same factor."""

    def curves(operator: Operator) -> list[SignalToNoiseCurve]:
        return [curve for curve in results.curves if curve.operator == operator]

    def grown(operator: Operator) -> str:
        counts = [curve.layers_grown for curve in curves(operator)]
        return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])

    def held(operator: Operator) -> str:
        levels = [curve.noise_std for curve in curves(operator) if curve.layers_held == results.layers]
        return f"at {len(levels)} noise levels (largest σ = {max(levels):g})" if levels else "at no noise level"

    return Section(
        title="Every layer improves the signal-to-noise ratio by the same factor",
        claim=html(
            "In a transformer with attention layers only, the ratio of signal to noise of a cluster's tokens is "
            "claimed to grow by one constant factor per layer ("
        )
        + Markup("<a href='https://arxiv.org/abs/2506.03790'>arXiv 2506.03790</a>)."),
        formula="SNR of cluster k = ‖Z U_k U_k^⊤‖ / ‖Z (I − U_k U_k^⊤)‖\n"
        "SNR in layer l + 1 = (1 + ητ) · SNR in layer l",
        how=f"{results.tokens} tokens from {results.h} orthogonal subspaces of dimension {results.p} that fill d = "
        f"{results.d}; {results.layers} layers with η = {results.step_size:g}; {results.draws} draws. The factor is "
        f"exact if every token attends with weight τ = {results.threshold:g} to itself in its own subspace, and to "
        "nothing elsewhere; the thresholded softmax is meant to achieve this. It was also applied to tokens normalised "
        "before attention, as in a network, and without threshold (then τ is at most 1).",
        found=(
            f"The predicted factor is {1 + results.step_size * results.threshold:.2f} with the threshold and "
            f"{1 + results.step_size:.2f} without. The table shows for how many of the {results.layers} layers it "
            "holds.",
            "With the network's softmax the first layer gains a factor of "
            f"{span([curve.factor[0].mean for curve in curves('network')])} over the noise levels, and the ratio grows "
            f"for {grown('network')} layers in a row; with s = 1, for {grown('softmax')}.",
        ),
        limits=(
            "Without normalisation tokens grow with every layer, until attention is also peaked in the subspaces in "
            "which a token is only noise. It then takes over what other clusters' tokens have there, and the ratio "
            "falls. The constant factor therefore ends after some layers; the stronger the noise, the earlier.",
            "Without the threshold, every token takes a little from every other in every subspace, and the ratio falls "
            "after a few layers. The constant factor is a statement about thresholded attention, not about the "
            "softmax of real networks. Their sparse-coding step between the attention layers was not part of this "
            "experiment.",
        ),
        glance=f"The predicted factor holds in all {results.layers} layers {held('threshold')} with the operator "
        f"as it is, {held('normalised')} with normalised tokens, and {held('network')} with the network's softmax.",
        caption="Ratio of signal to noise, relative to its start, after each layer (logarithmic). Dashed: predicted. "
        "Curves that coincide with it hide one another.",
        table=_factor_table(results),
    )


def _factor_table(results: SignalToNoise) -> Table:
    """For each noise level: how many layers have the predicted factor, and the first layer's factor."""
    rows = []
    for noise_std in dict.fromkeys(curve.noise_std for curve in results.curves):
        curves = [curve for curve in results.curves if curve.noise_std == noise_std]
        rows.append([f"{noise_std:g}", *(f"{curve.layers_held}; {curve.factor[0].mean:.2f}" for curve in curves)])
    caption = (
        f"Number of layers, from the first, whose factor is within {HOLDS_WITHIN:.0%} of the predicted one; the first "
        "layer's factor"
    )
    return Table(["σ", *(title for _, title in OPERATORS.values())], rows, caption)
