"""Second claim: attention comes from a gradient step on the subspace rate, expanded to first order.

The step downhill has two terms, -W, which shrinks tokens, and +P W, which mixes them. The published layer keeps the
second alone. Both are measured here: the step with both terms ("restored") and the published one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.interpret.theory.spread import Spread, cosine, generator, relative_error, spreads
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

RADII = (0.01, 0.03, 0.1, 0.3, 0.9, 3.0, 10.0)
ORDERS = (0, 1, 2)
SCALES = {"s = 1": 1.0, "s = p^-1/2": None}
STEP_LENGTH = 0.1  # of a step whose change of R^c is measured, as a share of the tokens' norm


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """How near the approximations of the gradient come, over draws.

    Attributes:
        radius: a max_k ||W_k||^2, which must be below 1 for the series to converge.
        error: relative, of each approximation; of the softmax forms after the best factor has been put before them.
        cosine: between each approximation and the exact gradient.
        mixing: cosine between the parts that mix tokens: a W_k minus the exact gradient, and what stands for it.
        descent: cosine between the exact descent direction, -grad R^c, and each step of `softmax_steps`.
        change: relative change of R^c by each step and by the exact one, all of the same length.
        official_change: the same of R^c as the official code takes it, which does not see the length of projections.
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


def measure_attention(seed: int = 0, draws: int = 5, *, radii: Sequence[float] = RADII) -> Attention:
    """Sweep the distortion, which decides how fast the series converges; subspaces orthogonal, then tilted."""
    d, h, p, tokens, noise_std = 32, 4, 8, 128, 0.2

    def point(radius: float, tilt: float) -> AttentionPoint:
        rows = [_draw(seed, draw, radius, tilt, (h, d, p), tokens, noise_std) for draw in range(draws)]
        return AttentionPoint(
            radius=radius,
            error=spreads([row.error for row in rows]),
            cosine=spreads([row.cosine for row in rows]),
            mixing=spreads([row.mixing for row in rows]),
            descent=spreads([row.descent for row in rows]),
            change=spreads([row.change for row in rows]),
            official_change=spreads([row.official_change for row in rows]),
            coherence=Spread.of([row.coherence for row in rows]),
        )

    return Attention(
        draws=draws,
        d=d,
        h=h,
        p=p,
        tokens=tokens,
        noise_std=noise_std,
        orthogonal=tuple(point(radius, 0.0) for radius in radii),
        coherent=tuple(point(radius, 0.03) for radius in radii),
    )


class _Draw(NamedTuple):
    error: dict[str, float]
    cosine: dict[str, float]
    mixing: dict[str, float]
    descent: dict[str, float]
    change: dict[str, float]
    official_change: dict[str, float]
    coherence: float


def tilt_bases(u: Float[Tensor, "h d p"], tilt: float, source: torch.Generator | None = None) -> Float[Tensor, "h d p"]:
    """Bases disturbed by `tilt` times Gaussian noise, each made orthonormal again: coherent if they were not."""
    noise = torch.randn(u.shape, generator=source, dtype=u.dtype)
    q, r = torch.linalg.qr(u + tilt * noise)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def softmax_steps(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"]) -> dict[str, Float[Tensor, "n d"]]:
    r"""Steps with the softmax in the place of the auto-correlation, for both scales.

    Restored: sum_k (P_k W_k - W_k) U_k^T, the two terms of the step downhill. Published: sum_k P_k W_k U_k^T, which is
    MSSA with tied projections.
    """
    w = project(z, u)
    steps = {}
    for name, scale in SCALES.items():
        attended = ssa(w, scale)
        steps |= {f"restored, {name}": unproject(attended - w, u), f"published, {name}": unproject(attended, u)}
    return steps


def _draw(
    seed: int, draw: int, radius: float, tilt: float, shape: tuple[int, int, int], tokens: int, noise_std: float
) -> _Draw:
    source = generator(seed, draw)
    u = tilt_bases(orthonormal_bases(*shape, source), tilt, source)
    z = sample_mixture(tokens, u, noise_std, source).tokens
    w = project(z, u)
    a = radius / torch.linalg.matrix_norm(w, ord=2).amax().item() ** 2
    eps = (shape[2] / (tokens * a)) ** 0.5
    exact = subspace_coding_rate_gradient(z, u, eps)
    series = {f"order {m}": subspace_coding_rate_gradient(z, u, eps, neumann_order=m) for m in ORDERS}
    # The gradient with softmax(s W W^T) in the place of a W W^T.
    steps = softmax_steps(z, u)
    softmax = {f"softmax, {name}": -a * steps[f"restored, {name}"] for name in SCALES}
    errors = {name: relative_error(x, exact) for name, x in series.items()}
    errors |= {name: relative_error(_best_factor(x, exact) * x, exact) for name, x in softmax.items()}
    # All forms begin with a W_k, a mere shrinking. What they take from it is the part in which tokens meet.
    shrinking = a * unproject(w, u)
    mixing = {
        name: cosine(shrinking - x, shrinking - exact) for name, x in (series | softmax).items() if name != "order 0"
    }
    cosines = {name: cosine(x, exact) for name, x in (series | softmax).items()}
    moved = {name: _move(z, step) for name, step in {"gradient": -exact, **steps}.items()}
    return _Draw(
        error=errors,
        cosine=cosines,
        mixing=mixing,
        descent={name: cosine(step, -exact) for name, step in steps.items()},
        change={
            name: _change(subspace_coding_rate(x, u, eps), subspace_coding_rate(z, u, eps)) for name, x in moved.items()
        },
        official_change={
            name: _change(official_subspace_coding_rate(project(x, u)), official_subspace_coding_rate(w))
            for name, x in moved.items()
        },
        coherence=coherence(u).item(),
    )


def _move(z: Tensor, step: Tensor) -> Tensor:
    return z + STEP_LENGTH * torch.linalg.vector_norm(z) / torch.linalg.vector_norm(step) * step


def _change(after: Tensor, before: Tensor) -> float:
    return (after / before - 1).item()


def _best_factor(x: Tensor, exact: Tensor) -> Tensor:
    return (x * exact).sum() / x.square().sum()
