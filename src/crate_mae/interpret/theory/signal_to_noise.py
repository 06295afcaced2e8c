"""Third claim: every attention layer raises the signal-to-noise ratio by a constant factor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crate_mae.interpret.theory.spread import Spread, generator
from crate_mae.theory import (
    attention_membership,
    orthonormal_bases,
    project,
    sample_mixture,
    signal_to_noise,
    unproject,
)

NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
OPERATORS = ("threshold", "normalised", "softmax", "network")
HOLDS_WITHIN = 0.05
Operator = Literal["threshold", "normalised", "softmax", "network"]


@dataclass(frozen=True, kw_only=True)
class SignalToNoiseCurve:
    """One operator at one noise level.

    Attributes:
        operator: see `attention_layer`.
        noise_std: sigma.
        ratio: SNR of a cluster's tokens before the first layer and after each, averaged over clusters.
        factor: what each layer multiplies it by, over draws.
        predicted: the theorem's factor.
        layers_held: how many layers, from the first, have a mean factor within `HOLDS_WITHIN` of the predicted one.
        layers_grown: how many layers, from the first, have a mean factor above 1.
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
    """Curves of all operators and noise levels, with what they have in common."""

    draws: int
    d: int
    h: int
    p: int
    tokens: int
    layers: int
    step_size: float
    threshold: float
    curves: tuple[SignalToNoiseCurve, ...]


def measure_signal_to_noise(
    seed: int = 0, draws: int = 5, *, noise: Sequence[float] = NOISE, layers: int = 8
) -> SignalToNoise:
    r"""Layers Z <- Z + eta sum_k phi(W_k W_k^T) W_k U_k^T from noisy tokens; phi of three kinds.

    If phi gives every token tau on itself in its own subspace and nothing elsewhere, the part inside the token's own
    subspace grows by 1 + eta tau and the part outside stays. That is the theorem's argument, and its factor.
    """
    d, h, p, tokens, step_size, threshold = 128, 4, 32, 160, 0.5, 0.6
    curves = []
    for operator in OPERATORS:
        predicted = 1 + step_size * (threshold if operator in ("threshold", "normalised") else 1.0)
        for noise_std in noise:
            runs = []
            for draw in range(draws):
                source = generator(seed, draw)
                u = orthonormal_bases(h, d, p, source)
                sample = sample_mixture(tokens, u, noise_std, source)
                runs.append(_run(sample.tokens, sample.labels, u, operator, layers, step_size, threshold))
            curves.append(_curve(operator, noise_std, predicted, runs))
    return SignalToNoise(
        draws=draws,
        d=d,
        h=h,
        p=p,
        tokens=tokens,
        layers=layers,
        step_size=step_size,
        threshold=threshold,
        curves=tuple(curves),
    )


def attention_layer(
    z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], operator: Operator, step_size: float, threshold: float
) -> Float[Tensor, "n d"]:
    r"""Z + eta sum_k phi(W_k W_k^T) W_k U_k^T.

    "threshold" is phi = tau [softmax > tau], elementwise, with s = 1, the theorem's; "normalised" the same, but of
    tokens scaled to norm sqrt(p), as a network's layer normalisation would; "softmax" the softmax itself with s = 1;
    and "network" the softmax with s = p^-1/2, as in `mssa`.
    """
    w = project(z, u)
    seen = project(u.shape[-1] ** 0.5 * F.normalize(z, dim=-1), u) if operator == "normalised" else w
    membership = attention_membership(seen, None if operator == "network" else 1.0)
    if operator in ("threshold", "normalised"):
        membership = threshold * (membership > threshold).to(z.dtype)
    return z + step_size * unproject(membership @ w, u)


def _run(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    u: Float[Tensor, "h d p"],
    operator: Operator,
    layers: int,
    step_size: float,
    threshold: float,
) -> list[float]:
    """The ratio before the first layer and after each, averaged over the clusters that have tokens."""
    ratios = [_ratio(z, labels, u)]
    for _ in range(layers):
        z = attention_layer(z, u, operator, step_size, threshold)
        ratios.append(_ratio(z, labels, u))
    return ratios


def _ratio(z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], u: Float[Tensor, "h d p"]) -> float:
    each = [signal_to_noise(z[labels == k], u)[k] for k in labels.unique()]
    return torch.stack(each).mean().item()


def _curve(operator: Operator, noise_std: float, predicted: float, runs: list[list[float]]) -> SignalToNoiseCurve:
    steps = range(len(runs[0]) - 1)
    factor = tuple(Spread.of([run[i + 1] / run[i] for run in runs]) for i in steps)
    return SignalToNoiseCurve(
        operator=operator,
        noise_std=noise_std,
        ratio=tuple(Spread.of(list(values)) for values in zip(*runs, strict=True)),
        factor=factor,
        predicted=predicted,
        layers_held=_from_the_first(abs(layer.mean / predicted - 1) <= HOLDS_WITHIN for layer in factor),
        layers_grown=_from_the_first(layer.mean > 1 for layer in factor),
    )


def _from_the_first(layers: Iterable[bool]) -> int:
    """How many come before the first that is not."""
    return sum(1 for _ in takewhile(bool, layers))
