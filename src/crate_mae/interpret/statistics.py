"""Mean, spread and number of values that are seen one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from scipy.stats import t as student_t
from torch import Tensor

from crate_mae.errors import UserError


class Statistic(NamedTuple):
    """A mean, and how far it can be trusted.

    Attributes:
        mean: of the values.
        spread: their standard deviation (divided by n - 1); None of a single value.
        n: how many there were.
    """

    mean: float
    spread: float | None
    n: int

    def interval(self) -> tuple[float, float]:
        """Student's 95% interval of the mean; without bounds for a single value."""
        if self.spread is None:
            return -math.inf, math.inf
        half = float(student_t.ppf(0.975, self.n - 1)) * self.spread / math.sqrt(self.n)
        return self.mean - half, self.mean + half


class Running:
    """The statistic of values that come in batches, of which only sums are kept (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared differences from the mean

    def add(self, values: Float[Tensor, "b"]) -> None:
        """Take in one batch, in float64."""
        values = values.detach().cpu().double()
        n, mean = len(values), float(values.mean())
        total, difference = self.n + n, mean - self._mean
        self._squares += float((values - mean).square().sum()) + difference**2 * self.n * n / total
        self._mean += difference * n / total
        self.n = total

    def result(self) -> Statistic:
        """The statistic of everything so far."""
        assert self.n, "a statistic of nothing"
        return Statistic(self._mean, math.sqrt(self._squares / (self.n - 1)) if self.n > 1 else None, self.n)


def statistic(values: Float[Tensor, "b"]) -> Statistic:
    """The statistic of values that are all there."""
    running = Running()
    running.add(values)
    return running.result()


@dataclass(frozen=True)
class Row:
    """One measure at one place of one layer.

    Attributes:
        part: "encoder" or "decoder".
        layer: number of the layer, from 0.
        measure: what is measured.
        point: of which tokens, see `models.tracing.trace`; empty if of weights, or of a whole layer.
        mean: over what `over` says.
        spread: standard deviation over the same; None of a single value.
        n: number of values.
        over: "images", "heads", "pairs" of heads or of layers, "draws", or "layer" for one value of all of it.
    """

    part: str
    layer: int
    measure: str
    point: str
    mean: float
    spread: float | None
    n: int
    over: str


def row(place: tuple[str, int], measure: str, found: Statistic, *, point: str = "", over: str = "images") -> Row:
    """A row of a statistic.

    Raises:
        UserError: if it is not finite.
    """
    if not math.isfinite(found.mean):
        raise not_finite(place, measure)
    return Row(*place, measure, point, found.mean, found.spread, found.n, over)


def rows_of(place: tuple[str, int], values: Mapping[str, Float[Tensor, "k"]], over: str) -> list[Row]:
    """A row for each named set of values."""
    return [row(place, measure, statistic(found), over=over) for measure, found in values.items()]


def place_of(name: str) -> tuple[str, int]:
    """("decoder", 3) of "decoder.blocks.3"; a network that is an encoder alone has no part in its names."""
    *parts, _, number = name.split(".")
    return ("decoder" if "decoder" in parts else "encoder"), int(number)


def not_finite(place: tuple[str, int], measure: str) -> UserError:
    """What to say of a layer whose measure is NaN or infinite."""
    return UserError(
        f"Layer {place[1]} of the {place[0]} gives numbers that are not finite (in {measure}).\n"
        "The weights hold NaN or overflow: take an earlier checkpoint of the run."
    )


def find(rows: Sequence[Row], measure: str, point: str = "", part: str = "encoder") -> list[Row]:
    """The curve of one measure over the layers of a part."""
    return [r for r in rows if (r.measure, r.point, r.part) == (measure, point, part)]
