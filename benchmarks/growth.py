"""How time and memory of training grow with tokens, width, depth and batch: `python -m benchmarks.growth --help`.

One of the four is changed at a time, around one small model. Beside CRATE-MAE, as published and with visible patches
alone in the encoder, stands the ViT-MAE of the same width, depth and heads. On each axis x a power c x^k is fitted to
the cost per image, by least squares on logarithms.
"""

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.entries import Size
from benchmarks.report import command_line, common_options, heading, result_path
from benchmarks.worker import ask
from crate_mae.data.files import write_whole
from crate_mae.drawing.style import colour, encode, legend_above, marker, new_figure, panels
from crate_mae.models.config import CrateConfig, ViTConfig

AXES = {
    "tokens": (49, 196, 400, 784, 1600),  # squares
    "width": (96, 192, 384, 768),
    "depth": (2, 4, 8, 16),  # of encoder and of decoder
    "batch": (1, 2, 4, 8, 16, 32),
}
CENTRE = {"tokens": 196, "width": 192, "depth": 4, "batch": 4}
MODELS = {"ours": "CRATE-MAE", "ours, visible patches": "CRATE-MAE, visible patches", "timm blocks": "ViT-MAE"}
_PATCH_SIZE = 4
_HEAD_WIDTH = 32
_BYTES_OF_STATE = 16  # of a parameter: itself, its gradient and AdamW's two averages, in float32


@dataclass(frozen=True)
class Point:
    """What training costs one model at one place of an axis.

    Attributes:
        axis: what was changed.
        value: to what.
        model: label of the model.
        ms_per_image: of a step, median over rounds, divided by the batch.
        mb_per_image: peak memory above imports, parameters, gradients and optimizer, divided by the batch.
        gigaflops_per_image: matrix products of a step, divided by the batch.
    """

    axis: str
    value: int
    model: str
    ms_per_image: float
    mb_per_image: float
    gigaflops_per_image: float


COSTS = {"ms_per_image": "ms per image", "mb_per_image": "MB per image", "gigaflops_per_image": "Gflop per image"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write numbers, a table of exponents and a figure."""
    options = _parser().parse_args(arguments)
    points = list(_points(options))
    path = result_path("growth", options)
    command = command_line("benchmarks.growth", arguments)
    text = "\n".join([*heading("Growth of cost", command, options), *_tables(points), ""])
    write_whole(path, text.encode())
    write_whole(path.with_suffix(".csv"), _csv(points).encode())
    _draw(points, path.with_suffix(".png"))
    print(text)


def exponent(points: Sequence[Point], cost: str) -> float:
    """K of the power c x^k that is nearest to a cost, in logarithms."""
    x, y = [p.value for p in points], [getattr(p, cost) for p in points]
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _parser() -> argparse.ArgumentParser:
    parser = common_options(__doc__, rounds=5)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=float, default=float("inf"), help="leave out places beyond this, to try it")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    return parser


def _points(options: argparse.Namespace) -> Iterator[Point]:
    how = {key: getattr(options, key) for key in ("precision", "rounds", "clock", "threads")}
    for axis in options.axes:
        for value in (value for value in AXES[axis] if value <= options.most):
            size = _size(**CENTRE | {axis: value})
            for name, label in MODELS.items():
                yield _point(axis, value, label, size, ask("costs", size, name=name, **how))


def _point(axis: str, value: int, label: str, size: Size, found: dict[str, Any]) -> Point:
    (seconds,), (flops,) = found["seconds"].values(), found["flops"].values()
    beside_state = found["peak"] - _BYTES_OF_STATE * found["parameters"]
    per_image = [statistics.median(seconds) * 1e3, beside_state / 1e6, flops / 1e9]
    point = Point(axis, value, label, *(number / size.batch for number in per_image))
    print(point, file=sys.stderr, flush=True)
    return point


def _size(tokens: int, width: int, depth: int, batch: int) -> Size:
    side = round(tokens**0.5) * _PATCH_SIZE
    shared: dict[str, Any] = {"embed_dim": width, "num_heads": width // _HEAD_WIDTH, "depth": depth}
    shared |= {"decoder_depth": depth, "patch_size": _PATCH_SIZE, "image_size": (side, side)}
    return Size(CrateConfig(**shared), ViTConfig(**shared), batch)


def _lines(points: Sequence[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    """The points of each axis and model, in order."""
    for axis in dict.fromkeys(point.axis for point in points):
        for label in MODELS.values():
            yield axis, label, [point for point in points if (point.axis, point.model) == (axis, label)]


def _tables(points: Sequence[Point]) -> Iterator[str]:
    centre = ", ".join(f"{key} {value}" for key, value in CENTRE.items())
    yield f"Around {centre}, patches of {_PATCH_SIZE} x {_PATCH_SIZE} pixels, heads of {_HEAD_WIDTH}, 75% hidden,"
    yield "depth on either side, training (forward, backward, AdamW)."
    yield "Memory is the peak above imports and 16 bytes a parameter. In the table: exponents k of cost = c x^k over"
    yield "the axis, and in brackets over its last step alone. All numbers: the CSV file beside this one.\n"
    yield f"| axis | model | {' | '.join(COSTS.values())} |"
    yield "|---" * (2 + len(COSTS)) + "|"
    for axis, label, line in _lines(points):
        cells = [f"{exponent(line, cost):.2f} ({exponent(line[-2:], cost):.2f})" for cost in COSTS]
        yield f"| {axis}, {line[0].value} to {line[-1].value} | {label} | {' | '.join(cells)} |"


def _csv(points: Sequence[Point]) -> str:
    with io.StringIO(newline="") as file:
        writer = csv.DictWriter(file, list(vars(points[0])), lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(point).items()})
        return file.getvalue()


def _draw(points: Sequence[Point], path: Path) -> None:
    axes_names = list(dict.fromkeys(point.axis for point in points))
    costs = ["ms_per_image", "mb_per_image"]
    figure = new_figure(3.2 * len(axes_names) + 0.6, 6.0)
    grid = panels(figure, len(costs), len(axes_names), sharex="col", sharey="row")
    for axis, label, line in _lines(points):
        column, number = axes_names.index(axis), list(MODELS.values()).index(label)
        for row, cost in enumerate(costs):
            panel, x = grid[row, column], [point.value for point in line]
            panel.loglog(x, [getattr(point, cost) for point in line], color=colour(number), marker=marker(number))
            panel.lines[-1].set_label(label)
            panel.set_xticks(x, [str(value) for value in x], minor=False)
            panel.set_xticks([], minor=True)
    for row, cost in enumerate(costs):
        grid[row, 0].set_ylabel(COSTS[cost])
    for column, axis in enumerate(axes_names):
        grid[-1, column].set_xlabel(axis)
    legend_above(figure, grid[0, 0], len(MODELS))
    write_whole(path, encode(figure, "png"))


if __name__ == "__main__":
    main()
