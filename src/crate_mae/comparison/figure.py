"""The figures of a comparison: scores against costs, and the held-out loss during training."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from crate_mae.comparison.results import EntryResult, SeedSpread, score_compared, spread
from crate_mae.comparison.runs import Moment
from crate_mae.data.files import write_whole
from crate_mae.drawing.measures import MEASURES
from crate_mae.drawing.style import GREY, colour, encode, marker, new_figure, panels

_LABEL_GAP = 0.06  # of the axis, between the middles of two labels


def draw_scores(results: Sequence[EntryResult], pixels: dict[str, float], path: Path) -> None:
    """Draw the score that models are compared by against minutes, training FLOPs and parameters.

    Each entry has a point with its standard deviation over seeds, and a hollow one for its random initialisation.
    """
    name = score_compared(results)
    measure = MEASURES[name]
    trained = [_known(spread(result.scores.values(), name, measure.scale)) for result in results]
    random = [spread(result.random.values(), name, measure.scale) for result in results]
    of_pixels = spread([pixels], name, measure.scale)
    quantities: list[tuple[str, Callable[[EntryResult], float], bool]] = [
        ("minutes of training, search included", lambda r: r.minutes, False),
        ("training FLOPs, search included", lambda r: r.training_flops, False),
        ("parameters of the encoder (millions)", lambda r: r.costs.encoder_parameters / 1e6, True),
    ]
    figure = new_figure(12.5, 4.4)
    (all_axes,) = panels(figure, 1, len(quantities), sharey=True)
    for axes, (title, where, is_parameters) in zip(all_axes, quantities, strict=True):
        for number, (result, own, control) in enumerate(zip(results, trained, random, strict=True)):
            at = where(result)
            _draw_entry(axes, number, own, control, at=at, random_at=at if is_parameters else 0.0)
        if of_pixels:
            axes.axhline(of_pixels.mean, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.set_xlabel(title)
        largest = max(where(result) for result in results)
        axes.set_xlim(-0.04 * largest, 1.12 * largest)
    all_axes[0].set_ylabel(f"{measure.title} ({measure.suffix.strip()})")
    all_axes[0].margins(y=0.12)
    all_axes[1].xaxis.set_major_formatter(EngFormatter())
    figure.draw_without_rendering()  # settles the limits, on which the places of labels depend
    for axes, (_, where, _) in zip(all_axes, quantities, strict=True):
        points = [(where(result), own.mean) for result, own in zip(results, trained, strict=True)]
        _label(axes, short_names(results), points)
    if of_pixels:
        at = (0.5, of_pixels.mean)
        _write(all_axes[0], "raw pixels", at, (0.0, 3.0), color=GREY, xycoords=("axes fraction", "data"), ha="center")
        figure.suptitle("filled: trained; hollow: the same network with random initialisation", fontsize=10, color=GREY)
    write_whole(path, encode(figure, "png"))


def draw_curves(results: Sequence[EntryResult], path: Path) -> None:
    """Draw the held-out loss of every final run against minutes and images, with a line for each seed."""
    quantities: list[tuple[str, Callable[[Moment], float]]] = [
        ("minutes of the final run", lambda moment: moment.minutes),
        ("thousand images seen", lambda moment: moment.images / 1000),
    ]
    figure = new_figure(12.0, 4.2)
    (all_axes,) = panels(figure, 1, len(quantities), sharey=True)
    for axes, (title, where) in zip(all_axes, quantities, strict=True):
        for number, result in enumerate(results):
            for curve in result.curves:
                y = [moment.held_out_loss for moment in curve]
                axes.plot([where(moment) for moment in curve], y, color=colour(number), linewidth=1.5)
        axes.set_xlabel(title)
        axes.set_yscale("log")
        axes.set_xlim(0, 1.02 * max(where(curve[-1]) for result in results for curve in result.curves))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    all_axes[0].set_ylabel(MEASURES["held_out_loss"].label)
    figure.draw_without_rendering()
    ends = [(0.0, statistics.fmean(curve[-1].held_out_loss for curve in result.curves)) for result in results]
    for axes in all_axes:
        _label(axes, short_names(results), ends, at_margin=True)
    write_whole(path, encode(figure, "png"))


def short_names(results: Sequence[EntryResult]) -> list[str]:
    """Names of the entries, without patch and image size if these are the same for all."""
    names = [result.name.partition("?") for result in results]
    parts = [name.partition("_patch") for name, _, _ in names]
    is_common = len({end for _, _, end in parts}) == 1
    return [
        "".join([start if is_common else name, *settings])
        for (start, _, _), (name, *settings) in zip(parts, names, strict=True)
    ]


def _draw_entry(
    axes: Any, number: int, trained: SeedSpread, random: SeedSpread | None, *, at: float, random_at: float
) -> None:
    """Draw the point of an entry with an error bar, and the hollow one of its random initialisation."""
    style: dict[str, Any] = {"marker": marker(number), "color": colour(number), "markersize": 8}
    if random is not None:
        if random_at == at:
            axes.plot([at, at], [random.mean, trained.mean], color=colour(number), linewidth=0.8, alpha=0.5, zorder=2)
        hollow = {**style, "markerfacecolor": "white", "markeredgewidth": 1.6}
        axes.errorbar(random_at, random.mean, yerr=random.std or None, capsize=3, zorder=3, **hollow)
    axes.errorbar(at, trained.mean, yerr=trained.std or None, capsize=3, zorder=4, **style)


def _label(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]], *, at_margin: bool = False) -> None:
    """Write each name at the height of its point without overlap: beside it, or in the right margin."""
    to_axes = axes.transAxes.inverted()
    places = [to_axes.transform(axes.transData.transform(point)) for point in points]
    heights: list[float] = []
    order = sorted(range(len(points)), key=lambda i: places[i][1])
    for i in order:
        heights.append(max(places[i][1], heights[-1] + _LABEL_GAP) if heights else places[i][1])
    for i, height in zip(order, heights, strict=True):
        across = 1.0 if at_margin else places[i][0]
        is_left = across > 0.5 and not at_margin
        offset = (-9.0, -3.0) if is_left else (9.0, -3.0)
        style = {"xycoords": "axes fraction", "ha": "right" if is_left else "left", "color": colour(i), "zorder": 5}
        _write(axes, names[i], (across, height), offset, **style)


def _write(axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    halo = [withStroke(linewidth=3, foreground="white")]  # keeps it legible where it crosses a line
    axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=9, path_effects=halo, **style)


def _known(score: SeedSpread | None) -> SeedSpread:
    assert score is not None, "every final run was measured"
    return score
