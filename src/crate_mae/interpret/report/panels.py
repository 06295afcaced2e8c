"""What a figure of curves is made of: lines of subjects, in panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from crate_mae.interpret.layer_measures import OFFICIAL_RATE, RATE_OF, VALUE_RATE
from crate_mae.interpret.report.inspection import Measured
from crate_mae.interpret.report.subjects import LABELS
from crate_mae.interpret.statistics import Row

COLOUR_OF = {key: number for number, key in enumerate(LABELS)}


class Line(NamedTuple):
    """One curve.

    Attributes:
        label: for the legend.
        number: of colour and symbol.
        rows: its points, of encoder and decoder.
        dashed: whether it is a control within one network.
    """

    label: str
    number: int
    rows: list[Row]
    dashed: bool = False


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    lines: list[Line]


class Curves(NamedTuple):
    """A figure of panels.

    Attributes:
        name: of its files.
        title: as text.
        caption: two sentences on how to read it, as HTML.
        panels: those that have a curve.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]


def by_subject(subjects: Iterable[Measured], asked: Sequence[tuple[str, str, str]]) -> list[Panel]:
    """A panel for each (title, measure, point) that anybody has, with a line for each subject that has it."""
    subjects = list(subjects)
    panels = []
    for title, measure, point in asked:
        lines = [line for subject in subjects if (line := line_of(subject, measure, point))]
        if lines:
            panels.append(Panel(title, lines))
    return panels


def line_of(subject: Measured, measure: str, point: str) -> Line | None:
    """A subject's curve; of R^c of unit-length projections, which a black box does not have, its stand-in."""
    if rows := _both_parts(subject, measure, point):
        return Line(subject.label, COLOUR_OF[subject.key], rows)
    if measure in (OFFICIAL_RATE, RATE_OF["unit"]) and (rows := _both_parts(subject, VALUE_RATE, point)):
        return Line(f"{subject.label} (stand-in)", COLOUR_OF[subject.key], rows, dashed=True)
    return None


def _both_parts(subject: Measured, measure: str, point: str) -> list[Row]:
    return subject.find(measure, point) + subject.find(measure, point, part="decoder")
