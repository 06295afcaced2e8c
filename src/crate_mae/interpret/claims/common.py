"""What the five claims share: statistics over draws, how numbers are written, and a section of the report."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crate_mae.drawing import text
from crate_mae.drawing.style import draw_line
from crate_mae.drawing.templates import Table
from crate_mae.theory import match_up_to_scale


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the population; 0 for one draw) over draws."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        return cls(statistics.fmean(values), statistics.pstdev(values))


def spreads(rows: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """The spread of every key, over rows with the same keys."""
    return {key: Spread.of([row[key] for row in rows]) for key in rows[0]}


def spreads_by_step(rows: Sequence[Sequence[float]]) -> tuple[Spread, ...]:
    """The spread of every column, over rows of the same length."""
    return tuple(Spread.of(column) for column in zip(*rows, strict=True))


def generator(seed: int, draw: int) -> torch.Generator:
    """The random generator of a draw: the same in every experiment, so that only settings differ."""
    return torch.Generator().manual_seed(seed * 1000 + draw)


def cosine(x: Tensor, y: Tensor) -> float:
    """<X, Y> / (||X|| ||Y||), with matrices as vectors."""
    return match_up_to_scale(x, y).cosine.item()


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||X - exact|| / ||exact||."""
    return (torch.linalg.vector_norm(x - exact) / torch.linalg.vector_norm(exact)).item()


def draw_spreads(
    axes: Any, x: Sequence[float | int], y: Sequence[Spread], number: int, label: str, **options: Any
) -> None:
    """Draw a line of means with a band of one standard deviation; see `drawing.style.draw_line`."""
    draw_line(axes, x, [value.mean for value in y], [value.std for value in y], number, label, **options)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One claim in the report, in the notation of `drawing.text`.

    Attributes:
        title: the claim in a few words.
        claim: what is claimed.
        formula: the claim as a formula.
        how: how it was tested.
        found: the results, one or two sentences each.
        limits: where it fails, or was not tested.
        glance: the result in one sentence.
        caption: caption of the figure.
        table: further results; None if there are none.
    """

    title: str
    claim: str
    formula: str
    how: str
    found: tuple[str, ...]
    limits: tuple[str, ...]
    glance: str
    caption: str
    table: Table | None = None


def number(value: Spread) -> str:
    """Mean ± standard deviation, with digits that fit the deviation; as powers of ten for very small or large means."""
    if 0 < abs(value.mean) < 0.005 or abs(value.mean) >= 1000:
        return f"{text.number(value.mean)} ± {text.number(value.std)}"
    digits = 3 if value.std < 0.005 else 2
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}".replace("-", "−")


def span(values: Sequence[float]) -> str:
    """Smallest and largest value."""
    return f"{min(values):.2f} to {max(values):.2f}"
