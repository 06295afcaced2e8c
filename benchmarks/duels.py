"""Two entries, timed in turns, and what comes out of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.entries import Size
from benchmarks.worker import ask

# Ours, and what it is held against.
DUELS = {
    "training": [
        ("ours", "reference"),
        ("ours, layers computed again", "reference"),
        ("ours, visible patches", "reference"),
        ("ours, visible patches", "transformers"),
        ("ours, visible patches", "timm blocks"),
    ],
    "encoding": [("ours", "reference"), ("ours", "timm blocks"), ("ours", "transformers")],
}


@dataclass(frozen=True)
class Duel:
    """What was measured of two entries.

    Attributes:
        size: of both.
        precision: of both.
        task: training or encoding.
        names: ours, then the other.
        batch: images.
        seconds: median of each.
        gigaflops: operations of each, in thousands of millions.
        peak: rate of a plain product in the same rounds, thousands of millions of operations a second.
        shares: of the peak that each reached.
        ratio: how many times as long the other takes: lower quartile, median, upper quartile over rounds.
    """

    size: str
    precision: str
    task: str
    names: tuple[str, str]
    batch: int
    seconds: tuple[float, float]
    gigaflops: tuple[float, float]
    peak: float
    shares: tuple[float, float]
    ratio: tuple[float, float, float]

    @property
    def row(self) -> str:
        """Of a table in Markdown, under `HEAD`."""
        low, middle, high = self.ratio
        cells = [
            self.size,
            self.precision,
            self.task,
            " / ".join(self.names),
            _pair([second * 1000 for second in self.seconds], ",.1f"),
            _pair([self.batch / second for second in self.seconds], ",.0f"),
            f"**{middle:.2f}** ({low:.2f} to {high:.2f})",
            _pair(self.gigaflops, ",.1f"),
            f"{self.peak:,.0f}",
            _pair(self.shares, ".0%"),
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| size | precision | task | first / second | ms | images/s | ratio | Gflop | peak | share of peak |\n"
    + "|---" * 10
    + "|"
)


def fight(name: str, size: Size, precision: str, task: str, names: tuple[str, str], **options: Any) -> Duel:
    """Time two entries of the size of this name; the options are `rounds`, `clock` and `threads`."""
    found = ask("times", size, names=names, precision=precision, task=task, **options)
    first, second = (found["seconds"][name] for name in names)
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = statistics.median(first), statistics.median(second)
    gigaflops = found["flops"][names[0]] / 1e9, found["flops"][names[1]] / 1e9
    peak = statistics.median(found["rates"]) / 1e9
    shares = gigaflops[0] / seconds[0] / peak, gigaflops[1] / seconds[1] / peak
    return Duel(name, precision, task, names, size.batch, seconds, gigaflops, peak, shares, (low, middle, high))


def _pair(numbers: Sequence[float], form: str) -> str:
    return ", ".join(format(number, form) for number in numbers)
