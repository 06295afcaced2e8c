"""Figures of curves over the layers."""

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from crate_mae.drawing.style import GREY, colour, draw_line, marker, new_figure, panels
from crate_mae.interpret.report.panels import Curves, Line, Panel
from crate_mae.interpret.report.wording import interval
from crate_mae.interpret.statistics import Row

_WIDTH, _PANEL_HEIGHT, _LEGEND_HEIGHT = 11.0, 3.2, 0.6  # inches
_MOST_TICKS = 14
_LOGARITHMIC_FROM = 100.0  # largest value over smallest
_LEAST_SPAN = 0.1  # of an axis, relative to the largest value
_ONE_LINE = 5  # names in a line of the legend
_MORE_ROOM = 4  # panels of which there are as many stand in two columns


def draw_curves(curves: Curves) -> Figure:
    """All panels of a figure, with one legend above them."""
    columns = 2 if len(curves.panels) == _MORE_ROOM else min(3, len(curves.panels))
    rows = math.ceil(len(curves.panels) / columns)
    figure = new_figure(_WIDTH, rows * _PANEL_HEIGHT + _LEGEND_HEIGHT)
    axes = panels(figure, rows, columns).ravel()
    for place, panel in zip(axes, curves.panels, strict=False):
        _draw_panel(place, panel)
    for place in axes[len(curves.panels) :]:
        place.set_axis_off()
    lines = {line.label: line for panel in curves.panels for line in panel.lines}
    handles = [_handle(line) for line in lines.values()]
    columns_of_legend = len(lines) if len(lines) <= _ONE_LINE else math.ceil(len(lines) / 2)
    figure.legend(
        handles, list(lines), loc="outside upper center", ncols=columns_of_legend, frameon=False, fontsize=10.5
    )
    return figure


def _draw_panel(axes: Any, panel: Panel) -> None:
    rows = [row for line in panel.lines for row in line.rows]
    first_of_decoder = 1 + max((row.layer for row in rows if row.part == "encoder"), default=-1)
    for line in panel.lines:
        for part, offset in (("encoder", 0), ("decoder", first_of_decoder)):
            found = [row for row in line.rows if row.part == part]
            if found:
                _draw_part(axes, line, found, offset)
    axes.set_title(panel.title)
    _label_layers(axes, rows, first_of_decoder)
    _scale(axes, [row.mean for row in rows])


def _scale(axes: Any, values: list[float]) -> None:
    """Powers of ten where they are needed, and no magnifying of what hardly differs."""
    low, high = min(values), max(values)
    if low > 0 and high > _LOGARITHMIC_FROM * low:
        axes.set_yscale("log")
        return
    bottom, top = axes.get_ylim()
    missing = _LEAST_SPAN * max(abs(low), abs(high)) - (top - bottom)
    if missing > 0:
        axes.set_ylim(bottom - missing / 2, top + missing / 2)


def _draw_part(axes: Any, line: Line, rows: list[Row], offset: int) -> None:
    x = [row.layer + offset for row in rows]
    style = {"linestyle": "--", "markerfacecolor": "white"} if line.dashed else {}
    draw_line(axes, x, [row.mean for row in rows], [_half_width(row) for row in rows], line.number, "_", **style)


def _half_width(row: Row) -> float:
    """Half of the 95% interval of the mean over images; 0 of one image, and of what has no images."""
    low, high = interval(row)
    return (high - low) / 2 if math.isfinite(low) and row.over == "images" else 0.0


def _label_layers(axes: Any, rows: list[Row], first_of_decoder: int) -> None:
    """E0, E1, ... and D0, D1, ..., as many as can be read."""
    names = {row.layer: f"E{row.layer}" for row in rows if row.part == "encoder"}
    names |= {row.layer + first_of_decoder: f"D{row.layer}" for row in rows if row.part == "decoder"}
    step = math.ceil(len(names) / _MOST_TICKS)
    ticks = [x for x in sorted(names) if int(names[x][1:]) % step == 0]
    axes.set_xticks(ticks, [names[x] for x in ticks])
    axes.set_xlabel(
        "layer of encoder (E) and decoder (D)" if first_of_decoder <= max(names) else "layer of the encoder"
    )
    if 0 < first_of_decoder <= max(names):
        axes.axvline(first_of_decoder - 0.5, color=GREY, linewidth=1, linestyle=":")


def _handle(line: Line) -> Line2D:
    face = "white" if line.dashed else colour(line.number)
    return Line2D(
        [],
        [],
        color=colour(line.number),
        marker=marker(line.number),
        markersize=5,
        markerfacecolor=face,
        linestyle="--" if line.dashed else "-",
    )
