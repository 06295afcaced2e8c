"""The report of a run, `report.html`: its progress, results on held-out images, and what it is."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from math import ceil, isfinite
from signal import Signals
from typing import TYPE_CHECKING, Any

from crate_mae.data.documents import read_json
from crate_mae.data.files import write_whole
from crate_mae.drawing.page import render
from crate_mae.errors import RunStopped, first_line
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.preflight import StepTooLargeError
from crate_mae.training.progress import duration
from crate_mae.training.resume import describe_data_change
from crate_mae.training.run_directory import END, RunDirectory, numbers
from crate_mae.training.task import Task

if TYPE_CHECKING:  # every process of a run imports this file, and one of them draws
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 30.0
_SHARE_OF_TIME = 0.01
_RECENT_ROWS = 5  # whose speed gives the time that is left
_MOST_TICKS = 12

Row = Mapping[str, float | None]  # of metrics.csv


class RunReport:
    """Keeps the report of a run up to date, without holding up the run.

    It is written when the model has been measured on held-out images, but at most every half minute and for at most a
    hundredth of the run's time; and once more when the run ends, however it ends. A report that cannot be written is a
    warning in the log, and the run goes on.

    Args:
        directory: of the run.
        task: describes the result.
        plan: what was printed when the run started.
        writes: whether this process writes the report, as only the first of them does.
    """

    def __init__(self, directory: RunDirectory, task: Task, plan: dict[str, str], *, writes: bool) -> None:
        self.directory = directory
        self.task = task
        self.plan = plan
        self.writes = writes
        self.end = ""
        self._state: TrainState | None = None
        self._due = time.monotonic() + _SECONDS_BETWEEN

    def begin(self, state: TrainState, started: float) -> None:
        """Take the state that the run goes on from, and the time at which this process started.

        What other data it has gone on with is told beside the plan.
        """
        self._state, self._seconds_before, self._started = state, state.seconds, started
        changes = self.directory.data_changes.read()
        self.plan |= {f"data {n}": describe_data_change(change) for n, change in enumerate(changes, start=1)}

    def seconds(self) -> float:
        """The time that the run has taken so far, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Write into the log and the report how the block ended, if by an exception.

        A process that is killed writes nothing; the log of the next start says so.
        """
        try:
            yield
        except StepTooLargeError:  # another attempt follows
            raise
        except BaseException as error:
            where = f" after step {self._state.step:,}" if self._state else ""
            self.end = f"{_how_ended(error)}{where}."
            with suppress(OSError):  # which may be what ended it
                logger.info("%s%s", END, self.end)
            if self._state is not None:
                self._write()
            raise

    def update(self, step: int) -> None:
        """Write the report if this step has measured the model and the last report is old enough."""
        if step % self.task.config.monitor_steps == 0 and time.monotonic() >= self._due:
            self._write()

    def close(self) -> None:
        """Write the report of a run that has finished, and a line in the log."""
        logger.info("%sfinished.", END)
        self._write()

    def _write(self) -> None:
        if not self.writes or not self.directory.path.is_dir():  # the folder is gone: make no other
            return
        started = time.monotonic()
        try:
            write_whole(self.directory.report, render_report(self.directory, self.task, self.plan, self.end))
        except Exception:  # whatever it is, it is not worth a run
            logger.warning("%s could not be written; the run goes on without it.", self.directory.report, exc_info=True)
        ended = time.monotonic()
        self._due = ended + max(_SECONDS_BETWEEN, (ended - started) / _SHARE_OF_TIME)


def _how_ended(error: BaseException) -> str:
    if isinstance(error, RunStopped):
        return f"stopped by {Signals(error.signal).name} and saved"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "stopped at once; the steps since the last checkpoint are lost"
    return f"failed: {first_line(error).rstrip('.')} ({type(error).__name__})"


def render_report(directory: RunDirectory, task: Task, plan: Mapping[str, str], end: str = "") -> str:
    """The report as HTML, from what the run has written down so far.

    Args:
        directory: of the run.
        task: describes the result.
        plan: see `RunReport`.
        end: how the run has ended; empty while it goes on.
    """
    from crate_mae.drawing.style import encode

    rows, layers = numbers(directory.metrics()), directory.layers.read()
    completed_step, picture = directory.newest_picture() or (0, None)
    return render(
        "training/report.html.j2",
        title=f"crate-mae {task.config.command}: {directory.path.resolve().name}",
        progress=_progress(task, directory, rows, end),
        written=datetime.now().isoformat(sep=" ", timespec="seconds"),
        end=end,
        is_finished=directory.is_finished,
        resume_command=directory.resume_command,
        learning=encode(draw_learning(rows), "png") if rows else None,
        layers=encode(draw_layer_signals(layers), "png") if layers else None,
        completed=picture.read_bytes() if picture else None,
        completed_step=completed_step,
        plan=plan,
        options=directory.config_file.read_text(encoding="utf-8"),
        environment=_environment(directory),
    )


def _progress(task: Task, directory: RunDirectory, rows: Sequence[Row], end: str) -> str:
    """How far the run has come, and the newest result."""
    if directory.is_finished and end:
        return end
    if not rows:
        return "Nothing has been measured yet."
    config = task.config
    step, speeds = int(rows[-1]["step"] or 0), curve(rows, "images_per_second")[1][-_RECENT_ROWS:]
    text = f"Finished: {step:,} steps." if directory.is_finished else f"Step {step:,} of {config.steps:,}."
    if end:
        text += f" The run is not going on: {end}"
    elif speeds and not directory.is_finished and (speed := statistics.median(speeds)) > 0:
        seconds = (config.steps - step) * config.batch_size / speed
        text += f" At {speed:,.0f} images per second, {duration(seconds)} are left."
    if curve(rows, task.measures[0])[0]:
        text += " " + task.describe_result(rows)
    return text


def _environment(directory: RunDirectory) -> str:
    """Versions and machine, of the last start."""
    found: dict[str, Any] = read_json(directory.path / "environment.json")
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
    return f"Python {found['python']}, {', '.join(packages)}; {found['system']}, {found['cpus']} CPUs{gpus}."


_PANELS = {  # the columns of metrics.csv in each panel, by its title, with their names in the legend
    "loss": {"loss": "training", "held_out_loss": "held-out images", "val_loss": "validation images"},
    "k-NN accuracy": {"knn_accuracy": ""},
    "effective rank of features": {"feature_rank": ""},
    "mean cosine between images": {"feature_cosine": ""},
    "accuracy on validation images": {"val_accuracy": "top 1", "val_accuracy_top5": "top 5"},
    "learning rate": {"lr": ""},
    "images per second": {"images_per_second": ""},
}
_OF_TRAINING = ("loss", "lr", "images_per_second")  # and not of held-out images: these are grey
_SIGNALS = {"subspace_rate": "subspace rate R$^c$ (nats)", "zero_fraction": "exact zeros in the code (share)"}


def curve(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """One column of metrics.csv, where it has finite numbers: steps and values."""
    points = [(row["step"], row.get(key)) for row in rows]
    found = [(step, value) for step, value in points if step is not None and value is not None and isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def draw_learning(rows: Sequence[Row]) -> Figure:
    """Draw losses, learning rate, other measures of held-out images, and speed by step, as far as they were measured.

    Args:
        rows: of metrics.csv.
    """
    from crate_mae.drawing.lines import Line, Panel, draw_panels

    drawn = []
    for title, columns in _PANELS.items():
        measured = {key: curve(rows, key) for key in columns if curve(rows, key)[0]}
        lines = [
            Line(columns[key], *points, number=None if key in _OF_TRAINING else number)
            for number, (key, points) in enumerate(measured.items())
        ]
        if lines:
            drawn.append(Panel(lines, xlabel="step", ylabel=title, scale="from zero"))
    return draw_panels(drawn, columns=min(2, len(drawn)), width=5.5, height=2.9, legend="inside")


def draw_layer_signals(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Draw subspace rate and sparsity of every encoder layer by step: one line for each layer, from dark to light.

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
