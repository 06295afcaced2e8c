"""Curves over the layers of one model, and of another one beside it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from crate_mae.drawing.style import GREY, draw_line, legend_above, new_figure, panels
from crate_mae.interpret.layer_measures import VALUE_RATE
from crate_mae.interpret.statistics import Row, find

_MOST_TICKS = 16


class _Curve(NamedTuple):
    """One measure at one point of every layer (`interpret.layer_measures`), and the curve's number and label."""

    measure: str
    point: str
    number: int
    label: str


_POINTS = (("z", "before the layer"), ("z_half", "between its two steps"), ("z_next", "after the layer"))
# What the upright axis of a panel says, and its curves.
_PANELS = {
    "subspace rate R$^c$ (nats)": [
        _Curve("subspace_rate_normalised", point, number, label) for number, (point, label) in enumerate(_POINTS)
    ],
    "stand-in for R$^c$, by values (nats)": [
        _Curve(VALUE_RATE, point, number, label) for number, (point, label) in enumerate(_POINTS)
    ],
    "exact zeros in the code (share)": [_Curve("zero_fraction", "code", 2, "")],
    "effective rank of tokens": [_Curve("effective_rank", "z_next", 2, "after the layer")],
    "effective rank of features": [_Curve("feature_rank", "z_next", 2, "after the layer")],
}


def draw_layers(rows: Sequence[Row], control: Sequence[Row] = ()) -> Figure:
    """Subspace rate, sparsity and ranks of every layer, the decoder's behind the encoder's.

    R^c is that of the tokens as the layer's own MSSA would see them. In the encoder MSSA comes first and ISTA second;
    in the decoder first the dictionary, then MSSA with a minus sign. A black-box Vision Transformer has a stand-in for
    R^c, see `interpret.layer_measures.value_rates`. The rank of tokens is a mean over images, that of
    features (mean tokens) one number for all images. A panel of which nothing was measured is left out.

    Args:
        rows: what `interpret.measure.measure_layers` found.
        control: the same of another network, such as one with random weights: dashed.
    """
    shown = {title: curves for title, curves in _PANELS.items() if _measured(rows, curves)}
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(5.5 * columns, 3.1 * lines + 0.4)
    axes = panels(figure, lines, columns)
    for panel, (title, curves) in zip(axes.flat, shown.items(), strict=False):
        _draw_panel(panel, rows, control, curves)
        panel.set_ylabel(title)
    for empty in axes.flat[len(shown) :]:
        empty.axis("off")
    if control:
        axes.flat[0].plot([], [], color=GREY, linestyle="--", label="dashed: control")
    legend_above(figure, axes.flat[0], 4)
    return figure


def _measured(rows: Sequence[Row], curves: Sequence[_Curve]) -> list[Row]:
    """The rows that a panel shows."""
    wanted = {(curve.measure, curve.point) for curve in curves}
    return [row for row in rows if (row.measure, row.point) in wanted]


def _draw_panel(axes: Any, rows: Sequence[Row], control: Sequence[Row], curves: Sequence[_Curve]) -> None:
    """Curves that are broken between encoder and decoder, of which a part without any row is left out."""
    measured = _measured(rows, curves)
    starts = {"encoder": 0}
    if any(row.part == "decoder" for row in measured):
        starts["decoder"] = 1 + max(row.layer for row in measured if row.part == "encoder")
    for curve in curves:
        for part, start in starts.items():
            label = curve.label if part == "encoder" else "_"
            _draw_curve(axes, find(rows, curve.measure, curve.point, part), start, curve.number, label)
            dashed = {"linestyle": "--", "alpha": 0.6}
            _draw_curve(axes, find(control, curve.measure, curve.point, part), start, curve.number, "_", **dashed)
    axes.set_ylim(bottom=0)
    _name_layers(axes, measured, starts)


def _draw_curve(axes: Any, points: Sequence[Row], start: int, number: int, label: str, **options: Any) -> None:
    x, means = [start + row.layer for row in points], [row.mean for row in points]
    draw_line(axes, x, means, [row.spread or 0.0 for row in points], number, label, **options)


def _name_layers(axes: Any, rows: Sequence[Row], starts: dict[str, int]) -> None:
    """Numbers of layers, from 0 in either part, which a dotted line divides."""
    places = sorted({(starts[row.part] + row.layer, row.layer) for row in rows})
    every = math.ceil(len(places) / _MOST_TICKS)
    shown = [(place, layer) for place, layer in places if layer % every == 0]
    axes.set_xticks([place for place, _ in shown], [str(layer) for _, layer in shown])
    axes.set_xlim(-0.5, places[-1][0] + 0.5)
    axes.set_xlabel("layer of the encoder")
    if "decoder" in starts:
        axes.axvline(starts["decoder"] - 0.5, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("layer of the encoder, then of the decoder")
