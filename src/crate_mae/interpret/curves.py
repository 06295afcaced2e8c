"""Curves of measures over the layers of encoder and decoder, and the figure of `crate-mae viz layers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from crate_mae.data.numbers import student_half_width
from crate_mae.drawing import lines
from crate_mae.drawing.measures import MEASURES
from crate_mae.interpret.statistics import Row, find, short_place

POINT_NAMES = {"z": "input", "z_half": "after the first step", "z_next": "output"}

_MOST_TICKS = 14
_PARTS = ("encoder", "decoder")
# The measures of each panel of `draw_layers`, at which points.
_LAYERS = (
    ("subspace_rate_normalised", tuple(POINT_NAMES)),
    ("value_rate_official", tuple(POINT_NAMES)),
    ("zero_fraction", ("code",)),
    ("effective_rank", ("z_next",)),
    ("feature_rank", ("z_next",)),
)


class Curve(NamedTuple):
    """One measure over the layers.

    Attributes:
        label: for the legend.
        number: of colour and symbol.
        rows: its points, of encoder and decoder.
        dashed: whether it is a control.
    """

    label: str
    number: int
    rows: Sequence[Row]
    dashed: bool = False


def both_parts(rows: Sequence[Row], measure: str, point: str = "") -> list[Row]:
    """The curve of one measure over the layers of the encoder, then of the decoder."""
    return [row for part in _PARTS for row in find(rows, measure, point, part)]


def interval_half_width(row: Row) -> float:
    """Half of the 95% interval of the mean over images; 0 for one image, and for what has no images."""
    if row.over != "images" or row.spread is None:
        return 0.0
    return student_half_width(row.spread, row.n)


def layer_panel(
    title: str,
    curves: Sequence[Curve],
    *,
    band: Callable[[Row], float] = interval_half_width,
    scale: lines.Scale = "auto",
) -> lines.Panel:
    """A panel of curves, the decoder's layers behind the encoder's.

    Args:
        title: see `measures.Measure.label`.
        curves: at least one of them has a row.
        band: half width of the band around a row's mean.
        scale: of the vertical axis.
    """
    rows = [row for curve in curves for row in curve.rows]
    start = {"encoder": 0, "decoder": 1 + max((row.layer for row in rows if row.part == "encoder"), default=-1)}
    drawn = []
    for curve in curves:
        for part in _PARTS:  # a line each, with a gap between them
            found = [row for row in curve.rows if row.part == part]
            if found:
                x, y = [row.layer + start[part] for row in found], [row.mean for row in found]
                bands = [band(row) for row in found]
                drawn.append(lines.Line(curve.label, x, y, curve.number, bands, dashed=curve.dashed))
    names = {row.layer + start[row.part]: short_place(row.part, row.layer) for row in rows}
    has_decoder = any(row.part == "decoder" for row in rows)
    step = math.ceil(len(names) / _MOST_TICKS)
    return lines.Panel(
        drawn,
        title=title,
        xlabel="layer of encoder (E) and decoder (D)" if has_decoder else "layer of the encoder",
        scale=scale,
        ticks={x: names[x] for x in sorted(names) if int(names[x][1:]) % step == 0},
        divider=start["decoder"] - 0.5 if has_decoder and start["decoder"] else None,
    )


def draw_layers(rows: Sequence[Row], control: Sequence[Row] = ()) -> Figure:
    """Draw subspace rate, sparsity and ranks of every layer, with a band of one standard deviation over images.

    In the encoder MSSA comes first and ISTA second; in the decoder first the dictionary, then MSSA with a minus sign.
    The subspace rate of a Vision Transformer is a stand-in, see `layer_measures.value_rates`. Panels without
    measurements are left out.

    Args:
        rows: see `measure.measure_layers`.
        control: the same of another network, such as one with random initialisation: dashed.
    """
    panels = []
    for measure, points in _LAYERS:
        curves = []
        for point in points:
            label = POINT_NAMES.get(point, "output")  # a code is the output of its layer, but for a skip connection
            number = list(POINT_NAMES.values()).index(label)
            curves.append(Curve(label, number, both_parts(rows, measure, point)))
            curves.append(Curve(f"{label}, control", number, both_parts(control, measure, point), dashed=True))
        if any(curve.rows for curve in curves if not curve.dashed):
            title = MEASURES[measure].label
            panels.append(layer_panel(title, curves, band=lambda row: row.spread or 0.0, scale="from zero"))
    return lines.draw_panels(panels, columns=min(2, len(panels)), width=5.5, height=3.1)
