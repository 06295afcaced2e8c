"""The table of a comparison: for people in Markdown, for programs as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from crate_mae.comparison.outcome import PROBES, SCORES, Outcome, Spread, spread

_TITLES = {
    "linear": "linear probe, top-1",
    "knn": "k-NN, top-1",
    "psnr": "completion: PSNR of hidden patches",
    "ssim": "completion: SSIM",
    "mse": "completion: squared error, normalised pixels",
}


def table_rows(outcomes: Sequence[Outcome], pixels: dict[str, float]) -> list[list[str]]:
    """The table as text: a heading, then a line for each quantity with a cell for each contestant, and raw pixels."""
    with_pixels = bool(pixels)
    # Targets were normalised: the note below the table says what that means.
    mark = ", own statistics" if outcomes[0].contestant.config.norm_pix_loss else ""

    def line(title: str, cell: Callable[[Outcome], str], last: str = "") -> list[str]:
        return [title, *(cell(outcome) for outcome in outcomes), *([last] if with_pixels else [])]

    rows = [
        line("", lambda o: o.name, "raw pixels"),
        line("parameters, encoder", lambda o: _millions(o.costs.encoder_parameters)),
        line("parameters, all", lambda o: _millions(o.costs.parameters)),
        line("forward FLOPs an image, encoder, nothing hidden", lambda o: _scaled(o.costs.encoder_flops)),
        line("training FLOPs an image", lambda o: _scaled(o.costs.training_flops)),
        line("images/s in training, timed in turns", lambda o: f"{o.images_per_second:,.0f}"),
        line("peak memory of a training step", lambda o: _memory(o.costs.memory)),
        line("precision", lambda o: o.costs.precision),
        line("steps, search + final run", _steps),
        line("images seen in the final run", lambda o: f"{o.course.final_steps * o.batch_size:,}"),
        line("minutes used, search + final run", _minutes),
        line("training FLOPs used, both", lambda o: _scaled(o.training_flops)),
        line("learning rate chosen, per 256 images", lambda o: f"{o.trained.rate:.3g}"),
    ]
    for name, title in _TITLES.items():
        title = title if name in PROBES else title + mark
        if any(spread(outcome.scores, name) for outcome in outcomes):
            pixel_cell = score_text(name, spread([pixels], name)) if with_pixels else ""
            rows.append(line(title, lambda o, name=name: score_text(name, spread(o.scores, name)), pixel_cell))
        if name in PROBES and any(spread(outcome.random, name) for outcome in outcomes):
            title = f"{title}, random weights"
            rows.append(line(title, lambda o, name=name: score_text(name, spread(o.random, name))))
    return rows


def markdown(rows: Sequence[Sequence[str]], notes: Sequence[str], title: str) -> str:
    """The table and the notes below it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    lines = [f"# {title}", "", line(rows[0]), rule, *map(line, rows[1:]), "", "## How to read it", ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def csv_text(outcomes: Sequence[Outcome], pixels: dict[str, float]) -> str:
    """One line for each contestant, its random weights, and raw pixels; numbers in plain units, scores as shares."""
    rows = []
    for outcome in outcomes:
        rows.append({"model": outcome.name, "weights": "trained", **outcome.numbers(), **_score_cells(outcome.scores)})
        if cells := _score_cells(outcome.random):
            keys = ("parameters_encoder", "parameters", "encoder_flops_per_image")
            numbers = {key: value for key, value in outcome.numbers().items() if key in keys}
            rows.append({"model": outcome.name, "weights": "random", **numbers, **cells})
    if pixels:
        rows.append({"model": "pixels", "weights": "none", **_score_cells([pixels])})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def score_text(name: str, score: Spread | None, *, with_range: bool = True) -> str:
    """A score for people: the mean, and over several seeds the sample standard deviation and the range."""
    if score is None:
        return "-"
    scale, digits, unit = {
        "psnr": (1, 2, " dB"),
        "ssim": (1, 3, ""),
        "mse": (1, 4, ""),
    }.get(name, (100, 2, "%"))
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (score.mean, score.low, score.high))
    if score.std is None:
        return mean + unit
    text = f"{mean} ± {scale * score.std:.{digits}f}{unit}"
    return f"{text} ({low} to {high})" if with_range else text


def _score_cells(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name in SCORES:
        if found := spread(scores, name):
            cells |= {f"{name}_{key}": getattr(found, key) for key in ("mean", "std", "low", "high")}
    return cells


def _steps(outcome: Outcome) -> str:
    tries = len(outcome.trained.search_losses)
    search = f"{tries} x {outcome.course.search_steps:,} + " if tries else ""
    return f"{search}{outcome.course.final_steps:,}"


def _minutes(outcome: Outcome) -> str:
    search = f"{outcome.trained.search_minutes:.2f} + " if outcome.trained.search_losses else ""
    return f"{search}{outcome.final_minutes:.2f}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _scaled(flops: float) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.2f} {prefix}"
    return f"{flops:,.0f}"


def _memory(number: int | None) -> str:
    if number is None:
        return "not measured"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
