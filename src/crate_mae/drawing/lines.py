"""Line charts: panels of lines with symbols and bands, and one legend.

Curves over the layers of reports and over the steps of a run are drawn here. Charts are drawn elsewhere for what no
other has: names at the ends of lines (`comparison.figure`), a colour bar for layers (`training.report`), a tooltip at
every value, which only an SVG element of the app has (`app.curves`), and the axes of a claim (`interpret.claims`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from crate_mae.drawing.style import GREY, colour, draw_line, marker, new_figure
from crate_mae.drawing.style import panels as new_axes
from crate_mae.drawing.text import mathtext

Scale = Literal["auto", "from zero"]

_LOGARITHMIC_FROM = 100.0  # largest value over smallest
_LEAST_SPAN = 0.1  # of an axis, relative to the largest value
_ONE_LINE = 5  # names in a line of the legend
_LEGEND_HEIGHT = 0.6  # inches


class Line(NamedTuple):
    """One line of a panel.

    Attributes:
        label: for the legend, which has each label once; "" for none.
        x: places.
        y: heights.
        number: of colour and symbol; None is grey without symbols.
        spread: half widths of the band; empty for none.
        dashed: whether the line is dashed and its symbols are hollow.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    number: int | None = 0
    spread: Sequence[float] = ()
    dashed: bool = False


class Panel(NamedTuple):
    """Lines that share their axes.

    Attributes:
        lines: in the order in which they are drawn.
        title: above them.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        scale: of the vertical axis: "auto" is logarithmic where values differ a hundredfold, and magnifies nothing that
            hardly differs.
        ticks: of the horizontal axis, by their places; None leaves them to matplotlib.
        divider: place of a dotted vertical line.
    """

    lines: Sequence[Line]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    scale: Scale = "auto"
    ticks: Mapping[float, str] | None = None
    divider: float | None = None


def draw_panels(
    panels: Sequence[Panel],
    *,
    columns: int,
    width: float,
    height: float,
    legend: Literal["above", "inside"] = "above",
) -> Figure:
    """Draw panels row by row.

    Args:
        panels: at least one.
        columns: panels in a row.
        width: of a panel, in inches.
        height: of a panel, in inches.
        legend: one above all panels, or one inside each panel of several named lines.
    """
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(width * columns, height * rows + (_LEGEND_HEIGHT if legend == "above" else 0))
    axes = new_axes(figure, rows, columns).ravel()
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(place, panel)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if legend == "above":
        _legend(figure, [line for panel in panels for line in panel.lines])
    else:
        for place, panel in zip(axes, panels, strict=False):
            if len({line.label for line in panel.lines if line.label}) > 1:
                place.legend(frameon=False)
    return figure


def _draw_panel(axes: Any, panel: Panel) -> None:
    named: set[str] = set()
    for line in panel.lines:
        label = "_" if not line.label or line.label in named else mathtext(line.label)
        named.add(line.label)
        draw_line(axes, line.x, line.y, line.spread, line.number or 0, label, **_style(line))
    axes.set_title(mathtext(panel.title))
    axes.set_xlabel(mathtext(panel.xlabel))
    axes.set_ylabel(mathtext(panel.ylabel))
    if panel.ticks is not None:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    if panel.divider is not None:
        axes.axvline(panel.divider, color=GREY, linewidth=1, linestyle=":")
    _scale(axes, panel.scale, [value for line in panel.lines for value in line.y])


def _style(line: Line) -> dict[str, Any]:
    """The options of matplotlib's lines."""
    style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"} if line.dashed else {}
    if line.number is None:
        style |= {"color": GREY, "marker": ""}
    return style


def _scale(axes: Any, scale: Scale, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if scale == "from zero":
        axes.set_ylim(bottom=0)
    elif low > 0 and high > _LOGARITHMIC_FROM * low:
        axes.set_yscale("log")
    else:
        bottom, top = axes.get_ylim()
        missing = _LEAST_SPAN * max(abs(low), abs(high)) - (top - bottom)
        if missing > 0:
            axes.set_ylim(bottom - missing / 2, top + missing / 2)


def _legend(figure: Figure, lines: Sequence[Line]) -> None:
    """Each label once, above all panels."""
    named = {line.label: line for line in reversed(lines) if line.label}
    named = {label: named[label] for label in dict.fromkeys(line.label for line in lines) if label}
    if not named:
        return
    handles = []
    for line in named.values():
        shade = GREY if line.number is None else colour(line.number)
        style = {"color": shade, "marker": marker(line.number or 0), "linestyle": "-", "markersize": 5}
        handles.append(Line2D([], [], **{**style, **_style(line)}))
    columns = len(named) if len(named) <= _ONE_LINE else math.ceil(len(named) / 2)
    labels = [mathtext(label) for label in named]
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=10.5)
