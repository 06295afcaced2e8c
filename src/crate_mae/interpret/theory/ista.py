"""Fifth claim: ISTA steps approach the solution of a non-negative lasso, and one step is already on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import Lasso
from torch import Tensor

from crate_mae.interpret.theory.spread import Spread, generator
from crate_mae.theory import lasso_objective, sparse_codes

STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
STEP_SIZES = (0.5, 1.0, 1.9, 4.0)
_ACTIVE = 1e-8  # codes below are zero; the reference's own tolerance leaves less


@dataclass(frozen=True, kw_only=True)
class IstaCurve:
    """ISTA from one start with one step size, after each number of steps of `Ista.steps`.

    Attributes:
        start: "tokens" (A = X, as in the network) or "zero" (A = 0).
        step_size: eta, in units of 1/||D||^2.
        gap: (objective - minimum) / minimum.
        support: agreement of the sets of active codes: size of their intersection over that of their union.
        raises: whether any recorded mean gap is above the one before it.
    """

    start: Literal["tokens", "zero"]
    step_size: float
    gap: tuple[Spread, ...]
    support: tuple[Spread, ...]
    raises: bool


@dataclass(frozen=True, kw_only=True)
class Ista:
    """All curves, with what they have in common.

    Attributes:
        initial_gap: before the first step, by start.
        initial_support: the same.
        active: share of codes that are not zero at the minimum.
        largest_eigenvalue: ||D||^2.
    """

    draws: int
    d: int
    tokens: int
    threshold: float
    steps: tuple[int, ...]
    active: Spread
    largest_eigenvalue: Spread
    initial_gap: dict[str, Spread]
    initial_support: dict[str, Spread]
    curves: tuple[IstaCurve, ...]


def measure_ista(seed: int = 0, draws: int = 3, *, tokens: int = 32, steps: Sequence[int] = STEPS) -> Ista:
    """Tokens that a few atoms of a random square dictionary rebuild, with noise; lambda = 0.1."""
    d, threshold = 32, 0.1
    problems = [_problem(seed, draw, d, tokens, threshold) for draw in range(draws)]
    starts: tuple[Literal["tokens", "zero"], ...] = ("tokens", "zero")
    initial = {start: [_compare(_start(start, p[0]), p, threshold) for p in problems] for start in starts}
    return Ista(
        draws=draws,
        d=d,
        tokens=tokens,
        threshold=threshold,
        steps=tuple(steps),
        active=Spread.of([(best > _ACTIVE).double().mean().item() for _, _, best in problems]),
        largest_eigenvalue=Spread.of([_largest(dictionary) for _, dictionary, _ in problems]),
        initial_gap={start: Spread.of([gap for gap, _ in rows]) for start, rows in initial.items()},
        initial_support={start: Spread.of([support for _, support in rows]) for start, rows in initial.items()},
        curves=tuple(_curve(problems, start, eta, steps, threshold) for start in starts for eta in STEP_SIZES),
    )


def lasso_solution(x: Float[Tensor, "n d"], dictionary: Float[Tensor, "d m"], threshold: float) -> Float[Tensor, "n m"]:
    r"""The minimum of 1/2 ||x - a D^T||^2 + lambda ||a||_1 over a >= 0 for every token, by coordinate descent.

    scikit-learn divides the first term by the number of rows, here d, so its alpha is lambda / d.
    """
    solver = Lasso(alpha=threshold / len(dictionary), positive=True, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    codes = np.stack([solver.fit(dictionary.numpy(), token.numpy()).coef_ for token in x])
    return torch.from_numpy(codes).to(x.dtype)


Problem = tuple[Tensor, Tensor, Tensor]  # tokens, dictionary, best codes


def _problem(seed: int, draw: int, d: int, tokens: int, threshold: float) -> Problem:
    source = generator(seed, draw)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    dictionary = normal(d, d) / d**0.5
    codes = normal(tokens, d).abs() * (torch.rand(tokens, d, generator=source) < 0.2)
    x = codes @ dictionary.mT + 0.05 * normal(tokens, d)
    return x, dictionary, lasso_solution(x, dictionary, threshold)


def _curve(
    problems: Sequence[Problem],
    start: Literal["tokens", "zero"],
    relative_step: float,
    steps: Sequence[int],
    threshold: float,
) -> IstaCurve:
    rows = []
    for problem in problems:
        x, dictionary, _ = problem
        eta = relative_step / _largest(dictionary)
        codes, row, before = _start(start, x), [], 0
        for after in steps:
            codes = sparse_codes(x, dictionary, eta, threshold, after - before, start=codes)
            before = after
            row.append(_compare(codes, problem, threshold))
        rows.append(row)
    gap = tuple(Spread.of([gap for gap, _ in column]) for column in zip(*rows, strict=True))
    return IstaCurve(
        start=start,
        step_size=relative_step,
        gap=gap,
        support=tuple(Spread.of([support for _, support in column]) for column in zip(*rows, strict=True)),
        raises=any(later.mean > earlier.mean * (1 + 1e-9) + 1e-12 for earlier, later in pairwise(gap)),
    )


def _start(start: str, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x if start == "tokens" else torch.zeros_like(x)


def _compare(codes: Float[Tensor, "n m"], problem: Problem, threshold: float) -> tuple[float, float]:
    """Relative gap of the objective, and agreement of the supports."""
    x, dictionary, best = problem
    minimum = lasso_objective(best, x, dictionary, threshold).item()
    gap = lasso_objective(codes, x, dictionary, threshold).item() / minimum - 1
    ours, theirs = codes > _ACTIVE, best > _ACTIVE
    return gap, ((ours & theirs).sum() / (ours | theirs).sum()).item()


def _largest(dictionary: Float[Tensor, "d m"]) -> float:
    return torch.linalg.matrix_norm(dictionary, ord=2).item() ** 2
