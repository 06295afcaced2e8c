"""The figures of a run's page: what metrics.csv and layers.csv say, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, float | None]  # of metrics.csv

_MOST_TICKS = 12


class _Line(NamedTuple):
    """A column of metrics.csv, what the legend calls it, and whether held-out images say it."""

    key: str
    label: str
    is_held_out: bool = True


class Points(NamedTuple):
    """Steps at which something was measured, and what it was."""

    steps: list[float]
    values: list[float]


_PANELS = {
    "loss": (
        _Line("loss", "training", is_held_out=False),
        _Line("held_out_loss", "held-out images"),
        _Line("val_loss", "validation images"),
    ),
    "effective rank of features": (_Line("feature_rank", ""),),
    "accuracy on validation images": (_Line("val_accuracy", "top 1"), _Line("val_accuracy_top5", "top 5")),
    "learning rate": (_Line("lr", "", is_held_out=False),),
    "images per second": (_Line("images_per_second", "", is_held_out=False),),
}
_SIGNALS = {"subspace_rate": "subspace rate R$^c$ (nats)", "zero_fraction": "exact zeros in the code (share)"}


def curve(rows: Sequence[Row], key: str) -> Points:
    """One column of metrics.csv, where it has finite numbers."""
    points = [(row["step"], row.get(key)) for row in rows]
    found = [(step, value) for step, value in points if step is not None and value is not None and isfinite(value)]
    return Points([step for step, _ in found], [value for _, value in found])


def draw_learning(rows: Sequence[Row]) -> Figure:
    """Losses, learning rate, what else held-out images say, and speed, by step; what was not measured is left out.

    Args:
        rows: of metrics.csv.
    """
    from crate_mae.drawing.style import GREY, colour, marker, new_figure, panels

    shown = {title: [line for line in lines if curve(rows, line.key).steps] for title, lines in _PANELS.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    columns = min(2, len(shown))
    figure = new_figure(5.5 * columns, 2.9 * ceil(len(shown) / columns))
    axes = panels(figure, ceil(len(shown) / columns), columns)
    for panel, (title, lines) in zip(axes.flat, shown.items(), strict=False):
        for number, line in enumerate(lines):
            held_out = {"color": colour(number), "marker": marker(number), "markersize": 4}
            style = held_out if line.is_held_out else {"color": GREY, "linewidth": 1}
            panel.plot(*curve(rows, line.key), label=line.label, **style)
        panel.set_ylabel(title)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        if len(lines) > 1:
            panel.legend(frameon=False)
    for empty in axes.flat[len(shown) :]:
        empty.axis("off")
    return figure


def draw_layer_signals(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Subspace rate and sparsity of every encoder layer, by step; a line a layer, from dark to light.

    Args:
        rows: of layers.csv.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    from crate_mae.drawing.style import new_figure, panels

    layers = 1 + max(int(row["layer"]) for row in rows)
    # The lightest yellow is hard to see on white.
    colours = ListedColormap([colormaps["viridis"](0.9 * layer / max(1, layers - 1)) for layer in range(layers)])
    figure = new_figure(11.0, 3.2)
    (axes,) = panels(figure, 1, len(_SIGNALS))
    for panel, (measure, title) in zip(axes, _SIGNALS.items(), strict=True):
        for layer in range(layers):
            points = [row for row in rows if row["measure"] == measure and int(row["layer"]) == layer]
            steps, values = [int(row["step"]) for row in points], [float(row["value"]) for row in points]
            panel.plot(steps, values, color=colours(layer), marker="o", markersize=3, linewidth=1.2)
        panel.set_ylabel(title)
        panel.set_xlabel("step")
    bounds = [layer - 0.5 for layer in range(layers + 1)]
    scale = ScalarMappable(BoundaryNorm(bounds, layers), colours)
    ticks = range(0, layers, ceil(layers / _MOST_TICKS))
    figure.colorbar(scale, ax=list(axes), ticks=list(ticks), label="layer of the encoder")
    return figure
