"""How numbers become words: every verdict on the page is one of these rules, and none is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal, NamedTuple

from crate_mae.interpret.statistics import Row, Statistic

Verdict = Literal["falls", "rises", "unclear"]

VERDICT_RULE = (
    "A curve “falls” or “rises” if the 95% interval of its change from the first layer to the last does not contain 0, "
    "and shows “no clear change” if it does; changes are paired, image by image. Steps count the layers after which "
    "the mean is lower or higher."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: what links lead to.
        title: in a few words, as text.
        body: as HTML.
    """

    anchor: str
    title: str
    body: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the numbers say about one subject.

    Attributes:
        anchor: what links lead to.
        title: the subject, as text.
        answer: one or two statements, as HTML.
        more: further sentences, as HTML.
        table: of the numbers behind it, as HTML; empty if there are none.
    """

    anchor: str
    title: str
    answer: str
    more: tuple[str, ...] = ()
    table: str = ""


class Trend(NamedTuple):
    """How a measure goes from the first layer to the last.

    Attributes:
        first: mean in the first layer.
        last: mean in the last layer.
        verdict: see `VERDICT_RULE`.
        down: how many steps from a layer to the next go down.
        up: how many go up.
        steps: how many there are.
    """

    first: float
    last: float
    verdict: Verdict
    down: int
    up: int
    steps: int

    @property
    def ends(self) -> str:
        """Such as "541 → 361"."""
        return f"{number(self.first)} → {number(self.last)}"

    @property
    def direction(self) -> str:
        """Such as "falls (4 of 5 steps)"."""
        if self.verdict == "unclear":
            return "no clear change"
        steps = self.down if self.verdict == "falls" else self.up
        return f"{self.verdict} ({steps} of {plural(self.steps, 'step')})"

    def __str__(self) -> str:
        """Such as "541 → 361, falls (4 of 5 steps)"."""
        return f"{self.ends}, {self.direction}"


def trend(rows: Sequence[Row]) -> Trend | None:
    """The trend of a curve over the layers; None without a curve."""
    if not rows:
        return None
    means = [row.mean for row in rows]
    low, high = _change(rows[0], rows[-1])
    verdict: Verdict = "falls" if high < 0 else "rises" if low > 0 else "unclear"
    pairs = list(pairwise(means))
    down, up = sum(b < a for a, b in pairs), sum(b > a for a, b in pairs)
    return Trend(means[0], means[-1], verdict, down, up, len(pairs))


def _change(first: Row, last: Row) -> tuple[float, float]:
    """The 95% interval of the change from the first layer, paired over images; one value of a layer is its own."""
    if last.over == "layer":
        return last.mean - first.mean, last.mean - first.mean
    return Statistic(last.change or 0.0, last.change_spread, last.n).interval()


def interval(row: Row) -> tuple[float, float]:
    """The 95% interval of a row's mean: without bounds for a single image; one value of a whole layer is its own."""
    if row.over == "layer":
        return row.mean, row.mean
    return Statistic(row.mean, row.spread, row.n).interval()


def number(value: float) -> str:
    """Three digits, with a true minus sign; in powers of ten where decimals would show nothing."""
    if (value and abs(value) < 0.001) or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}·10<sup>{int(exponent)}</sup>"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}".rstrip(".") if value else "0"
    return text.replace("-", "−")


def rates_set(text: str) -> str:
    """Text as HTML, in which R^c and minus signs are set as they should be."""
    return escape(text).replace("R^c", "R<sup>c</sup>").replace(" - ", " − ")


def percent(share: float) -> str:
    """A share as whole percents, with a true minus sign."""
    return f"{100 * share:.0f}%".replace("-", "−")


def listed(words: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, word: str) -> str:
    """Such as "1 layer" and "6 layers"."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")
