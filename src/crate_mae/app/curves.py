"""Line charts over layers as SVG: sharp at any size, readable on a phone, with the values as tooltips."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from crate_mae.drawing.style import GREY

MARKED = "#ffebab"  # behind the current layer
_WIDTH, _HEIGHT = 380, 250  # of the chart with its labels, in units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 34, 44
_LINE = 19  # height of a line of text
_STEPS = (1, 2, 2.5, 5, 10)
_LONGEST_NAME = 42  # characters

Scale = Callable[[float], float]


class ChartLine(NamedTuple):
    """One line of a chart."""

    values: Sequence[float]  # one per layer
    colour: str  # of the line and of its symbols
    tip: str  # what a value is, for its tooltip
    dotted: bool = False  # with hollow symbols
    square: bool = False  # symbols, instead of round ones


def draw_curves(
    title: str, lines: Sequence[ChartLine], keys: Sequence[tuple[str, ChartLine]], layer: int, top: float | None = None
) -> str:
    """Draw lines over layers, with the current layer marked, as an SVG element that is also a valid file.

    Args:
        title: what is measured, and in which unit.
        lines: of equal or different lengths.
        keys: text and line style of each entry of the legend.
        layer: the current layer, from 0.
        top: largest value of the axis; by default slightly above the largest value.
    """
    layers = max(len(line.values) for line in lines)
    ticks = tick_values(top or max(value for line in lines for value in line.values))

    def x(layer: float) -> float:
        return _LEFT + (layer + 0.5) * (_WIDTH - _LEFT - _RIGHT) / layers

    def y(value: float) -> float:
        return _TOP + (1 - value / ticks[-1]) * (_HEIGHT - _TOP - _BOTTOM)

    height = _HEIGHT + _LINE * len(keys)
    parts = [
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text(0, 16, title, "start", bold=True),
        *_axes(x, y, ticks, layers, min(layer, layers - 1)),
        *(part for line in lines for part in _drawn(x, y, line)),
        *(part for number, key in enumerate(keys) for part in _key(_HEIGHT + _LINE * number, *key)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def tick_values(largest: float) -> list[float]:
    """Return at most six round numbers, from 0 to the first that is not below the largest value."""
    if not largest > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(power * each for each in _STEPS if largest <= 5 * power * each * (1 + 1e-9))
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]


def _axes(x: Scale, y: Scale, ticks: Sequence[float], layers: int, layer: int) -> list[str]:
    left, right = x(-0.5), x(layers - 0.5)
    floor, width = y(0), x(1) - x(0)
    band = (
        f'<rect x="{x(layer) - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" height="{floor - _TOP:.1f}" '
        f'fill="{MARKED}"/>'
    )
    parts = [band]
    for tick in ticks:
        shade = GREY if tick == 0 else "#d5d5d5"
        parts.append(f'<path d="M{left:.1f} {y(tick):.1f}H{right:.1f}" stroke="{shade}"/>')
        parts.append(_text(left - 7, y(tick) + 4.5, f"{tick:.10g}", "end"))
    every = math.ceil(layers / 12)
    numbers = [
        _text(x(number), floor + 18, str(number), "middle", bold=number == layer) for number in range(0, layers, every)
    ]
    return [*parts, *numbers, _text((left + right) / 2, floor + 37, "layer of the encoder", "middle")]


def _drawn(x: Scale, y: Scale, line: ChartLine) -> list[str]:
    points = [(x(number), y(value)) for number, value in enumerate(line.values)]
    tips = [f"layer {number}: {value:.4g} {line.tip}" for number, value in enumerate(line.values)]
    path = "L".join(f"{left:.1f} {top:.1f}" for left, top in points)
    symbols = [_symbol(*point, line, tip) for point, tip in zip(points, tips, strict=True)]
    return [_stroke(f"M{path}", line), *symbols]


def _key(y: float, text: str, line: ChartLine) -> list[str]:
    short = text if len(text) <= _LONGEST_NAME else f"{text[:16]}…{text[17 - _LONGEST_NAME :]}"
    return [_stroke(f"M2 {y + 8:.1f}H34", line), _symbol(18, y + 8, line), _text(44, y + 12.5, short, "start")]


def _stroke(path: str, line: ChartLine) -> str:
    dots = ' stroke-dasharray="2 4"' if line.dotted else ""
    return f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dots}/>'


def _symbol(x: float, y: float, line: ChartLine, tip: str = "") -> str:
    fill = "#fff" if line.dotted else line.colour
    look = f'fill="{fill}" stroke="{line.colour}" stroke-width="2"><title>{escape(tip)}</title>'
    if line.square:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {look}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {look}</circle>'


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"{weight}>{escape(text)}</text>'
