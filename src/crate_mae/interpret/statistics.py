"""Statistics of measures: mean, spread and number of values in each layer, and the trend over the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from crate_mae.data.numbers import student_half_width
from crate_mae.drawing.text import number, plural
from crate_mae.errors import UserError

Part = Literal["encoder", "decoder"]
Verdict = Literal["falls", "rises", "unclear"]


class Statistic(NamedTuple):
    """A mean, and how far it can be trusted.

    Attributes:
        mean: of the values.
        spread: their standard deviation (divided by n - 1); None for a single value.
        n: how many there were.
    """

    mean: float
    spread: float | None
    n: int

    def interval(self) -> tuple[float, float]:
        """Student's 95% interval of the mean; without bounds for a single value."""
        if self.spread is None:
            return -math.inf, math.inf
        half = student_half_width(self.spread, self.n)
        return self.mean - half, self.mean + half


def statistic(values: Float[Tensor, "b"]) -> Statistic:
    """The statistic of values, in float64."""
    values = values.detach().cpu().double()
    return Statistic(float(values.mean()), float(values.std()) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """One measure at one place of one layer.

    Attributes:
        part: "encoder" or "decoder".
        layer: number of the layer, from 0.
        measure: a name of `drawing.measures.MEASURES`, or one of its controls.
        point: the tokens that were measured, see `models.tracing.trace`; empty for weights, or for a whole layer.
        mean: over what `over` names.
        spread: standard deviation over the same; None for a single value.
        n: number of values.
        over: "images", "heads", "pairs" of heads or of layers, "draws", or "layer" for one value of all of it.
        change: mean change from the first layer of the part, image by image; None for what has no images.
        change_spread: standard deviation of that change; None for a single image.
    """

    part: str
    layer: int
    measure: str
    point: str
    mean: float
    spread: float | None
    n: int
    over: str
    change: float | None = None
    change_spread: float | None = None


def row(place: tuple[str, int], measure: str, found: Statistic, *, point: str = "", over: str = "images") -> Row:
    """A row of a statistic.

    Raises:
        UserError: if it is not finite.
    """
    if not math.isfinite(found.mean):
        raise not_finite(place, measure)
    return Row(*place, measure, point, found.mean, found.spread, found.n, over)


def rows_over_layers(values: Mapping[tuple[Part, int], Float[Tensor, "b"]], measure: str, point: str = "") -> list[Row]:
    """A row for each place from one value an image, with the change from the part's first layer, paired over images.

    Raises:
        UserError: if a value is not finite.
    """
    first: dict[str, Tensor] = {}
    rows = []
    for place, found in values.items():
        change = statistic(found.double() - first.setdefault(place[0], found).double())
        made = row(place, measure, statistic(found), point=point)
        rows.append(replace(made, change=change.mean, change_spread=change.spread))
    return rows


def rows_of(place: tuple[str, int], values: Mapping[str, Float[Tensor, "k"]], over: str) -> list[Row]:
    """A row for each named set of values."""
    return [row(place, measure, statistic(found), over=over) for measure, found in values.items()]


def place_of(name: str) -> tuple[Part, int]:
    """("decoder", 3) of "decoder.blocks.3"; a network that is an encoder alone has no part in its names."""
    *parts, _, number = name.split(".")
    return ("decoder" if "decoder" in parts else "encoder"), int(number)


def short_place(part: str, layer: int) -> str:
    """Such as "E0" and "D1"."""
    return f"{part[0].upper()}{layer}"


def not_finite(place: tuple[str, int], measure: str) -> UserError:
    """The error for a layer whose measure is NaN or infinite."""
    return UserError(
        f"Layer {place[1]} of the {place[0]} gives numbers that are not finite (in {measure}).\n"
        "The weights hold NaN or overflow: take an earlier checkpoint of the run."
    )


class Trend(NamedTuple):
    """How a measure changes from the first layer to the last.

    Attributes:
        first: mean in the first layer.
        last: mean in the last layer.
        verdict: "falls" or "rises" if the 95% interval of the change from first to last does not contain 0.
        direction: the same in words, such as "falls (4 of 5 steps)", which are from a layer to the next.
    """

    first: float
    last: float
    verdict: Verdict
    direction: str

    @property
    def ends(self) -> str:
        """Such as "541 → 361"."""
        return f"{number(self.first)} → {number(self.last)}"

    def __str__(self) -> str:
        """Such as "541 → 361, falls (4 of 5 steps)"."""
        return f"{self.ends}, {self.direction}"


def trend(rows: Sequence[Row]) -> Trend | None:
    """The trend of a curve over the layers; None without a curve."""
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    if last.over == "layer":
        low = high = last.mean - first.mean
    else:
        low, high = Statistic(last.change or 0.0, last.change_spread, last.n).interval()
    if low <= 0 <= high:
        return Trend(first.mean, last.mean, "unclear", "no clear change")
    verdict, sign = ("falls", -1) if high < 0 else ("rises", 1)
    along = sum(sign * (after.mean - before.mean) > 0 for before, after in pairwise(rows))
    return Trend(first.mean, last.mean, verdict, f"{verdict} ({along} of {plural(len(rows) - 1, 'step')})")


def find(rows: Sequence[Row], measure: str, point: str = "", part: str = "encoder") -> list[Row]:
    """The curve of one measure over the layers of a part."""
    return [r for r in rows if (r.measure, r.point, r.part) == (measure, point, part)]
