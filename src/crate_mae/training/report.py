"""What a run writes down about itself: rows of metrics.csv, the same for trackers like TensorBoard, and its report."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from math import ceil, isfinite
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import LoggerType

from crate_mae.data.documents import read_json
from crate_mae.data.files import write_whole
from crate_mae.drawing.measures import MEASURES
from crate_mae.drawing.templates import render
from crate_mae.drawing.text import duration, mathtext
from crate_mae.errors import RunStopped, UserError, first_line, install_command
from crate_mae.training.checkpoint import TrainState, check_state
from crate_mae.training.model_state import ModelState
from crate_mae.training.options import RunOptions
from crate_mae.training.preflight import StepTooLargeError
from crate_mae.training.processes import first_decides
from crate_mae.training.resume import describe_data_change
from crate_mae.training.run_directory import END, RunDirectory, numbers
from crate_mae.training.task import BEST, Task

if TYPE_CHECKING:  # every process of a run imports this file, and one of them draws
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 30.0
_SHARE_OF_TIME = 0.01
_RECENT_ROWS = 5  # whose speed gives the time that is left
_MOST_TICKS = 12

Row = Mapping[str, float | None]  # of metrics.csv


class Logbook:
    """Writes rows of metrics.csv at their steps.

    A row holds the mean loss since the row before. The first process measures and writes; all keep the running mean.

    Attributes:
        images_per_second: speed since the last row, over all processes.
        data_wait: share of the time since the last row that was spent waiting for images.
    """

    def __init__(self, task: Task, accelerator: Accelerator, report: RunReport) -> None:
        self.report = report
        self.table = task.directory.metrics((*task.measures, BEST) if task.score else task.measures)
        self.task = task
        self.accelerator = accelerator
        if accelerator.is_main_process:
            self.table.widen()
        self.images_per_second = self.data_wait = 0.0
        self._restart_clock()

    def record(self, model_state: ModelState, state: TrainState, row: dict[str, float], *, waited: float) -> bool:
        """Note one step: its speed always, a row and a measurement on held-out images when they are due.

        The running mean of the loss in `state` is emptied into the row, and the best score noted there. `row` has the
        values for the step itself; `waited` are the seconds that this process waited for its images.

        Returns:
            whether the model has just been measured, and is the best so far.
        """
        config = self.task.config
        self._steps += 1
        self._waited += waited
        seconds = time.perf_counter() - self._since
        self.images_per_second = self._steps * config.batch_size / seconds
        self.data_wait = self._waited / seconds
        measures = state.step == config.steps or state.step % config.monitor_steps == 0
        if not measures and state.step % config.log_steps:
            return False
        mean = {"loss": state.loss_sum / state.loss_count} if state.loss_count else {}
        row = {
            "step": state.step,
            "epoch": round(state.step / self.task.steps_per_epoch, 4),
            **mean,
            **row,
            "images_per_second": round(self.images_per_second, 1),
            "data_wait": round(self.data_wait, 4),
        }
        state.loss_sum, state.loss_count = 0.0, 0
        is_best = False
        if measures:
            measured = self._measure(model_state, state.step)
            is_best = state.note_score(measured.get(self.task.score))
            row |= measured
            row |= {} if state.best_score is None else {BEST: state.best_score}
        self._write(row)
        self.report.update(state.step)
        self._restart_clock()  # measuring and drawing do not count for the speed
        return is_best

    def begin(self, model_state: ModelState) -> None:
        """Write the row of step 0, of the model before training; it is not saved, and cannot be the best."""
        measured = self._measure(model_state, 0)
        self._write({"step": 0, "epoch": 0.0, **measured})
        self._restart_clock()

    def _measure(self, model_state: ModelState, step: int) -> dict[str, float]:
        """Measure on held-out images; all processes get the result, since it decides about checkpoints."""
        check_state(self.accelerator, model_state, self.task.directory, step)
        with model_state.measured(self.accelerator) as model:
            return first_decides(self.accelerator, lambda: self.task.measure(model, step))

    def _write(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.task.directory.check_present()
            self.table.append([row])
        values = {key: value for key, value in row.items() if key != "step"}
        self.accelerator.log(values, step=int(row["step"]))

    def _restart_clock(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0


def choose_trackers(asked: str | Sequence[str] | None, origin: str) -> tuple[str, ...]:
    """The trackers to use: those asked for; by default TensorBoard if it is installed.

    Raises:
        UserError: for a tracker that Accelerate does not know or that is not installed.
    """
    if asked is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    asked = (asked,) if isinstance(asked, str) else tuple(asked)
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in asked:
        if name not in known:
            raise UserError(f"Unknown tracker {name}{origin}: --trackers takes {', '.join(known)}.")
        if importlib.util.find_spec(name) is None:
            how = install_command(name) if name in ("tensorboard", "wandb") else f"pip install {name}"
            raise UserError(f"The tracker {name}{origin} is not installed: {how}, or give --no-trackers.")
    return asked


@contextmanager
def open_trackers(accelerator: Accelerator, config: RunOptions, run: Path, start_step: int) -> Iterator[None]:
    """Start the trackers, have TensorBoard forget what came after `start_step`, and close them in the end.

    A thread of TensorBoard that cannot write would print a traceback. Its error is raised again in this thread, by the
    next row or by closing, where it is turned into a message.
    """
    usual = threading.excepthook

    def quiet(raised: threading.ExceptHookArgs) -> None:
        if not (isinstance(raised.exc_value, OSError) and type(raised.thread).__module__.startswith("tensorboard.")):
            usual(raised)

    options = {"tensorboard": {"purge_step": start_step + 1}, "wandb": {"name": run.name}}
    threading.excepthook = quiet
    try:
        if config.trackers:
            accelerator.init_trackers("", init_kwargs={name: options.get(name, {}) for name in config.trackers})
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
    finally:
        threading.excepthook = usual


class RunReport:
    """Keeps the report of a run up to date, without holding up the run.

    It is written when the model has been measured on held-out images, but at most every half minute and for at most a
    hundredth of the run's time; and once more when the run ends, however it ends. If it cannot be written, the log has
    a warning, and the run continues. Only the first process writes it (`writes`).
    """

    def __init__(self, task: Task, plan: dict[str, str], *, writes: bool) -> None:
        self.task = task
        self.plan = plan
        self.writes = writes
        self.end = ""
        self._state: TrainState | None = None
        self._due = time.monotonic() + _SECONDS_BETWEEN

    def begin(self, state: TrainState, started: float) -> None:
        """Take the state that the run continues from, and the time at which this process started.

        Changes of the data are listed with the plan.
        """
        self._state, self._seconds_before, self._started = state, state.seconds, started
        changes = self.task.directory.data_changes.read()
        self.plan |= {f"data {n}": describe_data_change(change) for n, change in enumerate(changes, start=1)}

    def seconds(self) -> float:
        """The time that the run has taken so far, over all starts."""
        return self._seconds_before + time.monotonic() - self._started

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Write into the log and the report how the block ended, if by an exception.

        A process that is killed writes nothing; the log of the next start records it.
        """
        try:
            yield
        except StepTooLargeError:  # another attempt follows
            logger.info("%sthe first step did not fit in memory.", END)
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
        report = self.task.directory.report
        if not self.writes or not report.parent.is_dir():  # the folder is gone: make no other
            return
        started = time.monotonic()
        try:
            write_whole(report, render_report(self.task, self.plan, self.end))
        except Exception:  # whatever it is, it is not worth a run
            logger.warning("%s could not be written; the run continues without it.", report, exc_info=True)
        ended = time.monotonic()
        self._due = ended + max(_SECONDS_BETWEEN, (ended - started) / _SHARE_OF_TIME)


def _how_ended(error: BaseException) -> str:
    if isinstance(error, RunStopped):
        return f"stopped by {Signals(error.signal).name} and saved"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "stopped at once; the steps since the last checkpoint are lost"
    return f"failed: {first_line(error).rstrip('.')} ({type(error).__name__})"


def render_report(task: Task, plan: Mapping[str, str], end: str) -> str:
    """The report as HTML, from what the run has recorded so far; `end` is empty while the run continues."""
    from crate_mae.drawing.style import encode

    directory = task.directory
    rows, layers = numbers(directory.metrics()), directory.layers.read()
    completed_step, picture = directory.newest_picture() or (0, None)
    return render(
        "training/report.html.j2",
        title=f"crate-mae {task.config.command}: {directory.path.resolve().name}",
        progress=_progress(task, rows, end),
        written=datetime.now().isoformat(sep=" ", timespec="seconds"),
        end=end,
        is_finished=directory.is_finished,
        resume_command=task.config.resume_command,
        learning=encode(draw_learning(rows), "png") if rows else None,
        layers=encode(draw_layer_signals(layers), "png") if layers else None,
        completed=picture.read_bytes() if picture else None,
        completed_step=completed_step,
        plan=plan,
        options=directory.config_file.read_text(encoding="utf-8"),
        environment=_environment(directory),
    )


def _progress(task: Task, rows: Sequence[Row], end: str) -> str:
    """How far the run has come, and the newest result."""
    is_finished = task.directory.is_finished
    if is_finished and end:
        return end
    if not rows:
        return "Nothing has been measured yet."
    config = task.config
    step, speeds = int(rows[-1]["step"] or 0), curve(rows, "images_per_second")[1][-_RECENT_ROWS:]
    text = f"Finished: {step:,} steps." if is_finished else f"Step {step:,} of {config.steps:,}."
    if end:
        text += f" The run has stopped: {end}"
    elif speeds and not is_finished and (speed := statistics.median(speeds)) > 0:
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


_PANELS = (  # the columns of metrics.csv in each panel, named after its first, with their names in the legend
    {"loss": "training", "held_out_loss": "held-out images", "val_loss": "validation images"},
    {"knn_accuracy": ""},
    {"feature_rank": ""},
    {"feature_cosine": ""},
    {"val_accuracy": "top 1", "val_accuracy_top5": "top 5"},
    {"lr": ""},
    {"images_per_second": ""},
)
_OF_TRAINING = ("loss", "lr", "images_per_second")  # and not of held-out images: these are grey
_SIGNALS = {  # measures of layers.csv: its `subspace_rate` is that of the official code
    "subspace_rate": MEASURES["subspace_rate_official"].label,
    "zero_fraction": MEASURES["zero_fraction"].label,
}


def curve(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """One column of metrics.csv, where it has finite numbers: steps and values."""
    points = [(row["step"], row.get(key)) for row in rows]
    found = [(step, value) for step, value in points if step is not None and value is not None and isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def draw_learning(rows: Sequence[Row]) -> Figure:
    """Draw losses, learning rate, other measures of held-out images, and speed by step, as far as there are any."""
    from crate_mae.drawing.lines import Line, Panel, draw_panels

    drawn = []
    for columns in _PANELS:
        measured = {key: curve(rows, key) for key in columns if curve(rows, key)[0]}
        lines = [
            Line(columns[key], *points, number=None if key in _OF_TRAINING else number)
            for number, (key, points) in enumerate(measured.items())
        ]
        if lines:
            drawn.append(Panel(lines, xlabel="step", ylabel=MEASURES[next(iter(columns))].title, scale="from zero"))
    return draw_panels(drawn, columns=min(2, len(drawn)), width=5.5, height=2.9, legend="inside")


def draw_layer_signals(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Draw subspace rate and sparsity of every encoder layer by step: one line for each layer, from dark to light."""
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
        panel.set_ylabel(mathtext(title))
        panel.set_xlabel("step")
    bounds = [layer - 0.5 for layer in range(layers + 1)]
    scale = ScalarMappable(BoundaryNorm(bounds, layers), colours)
    ticks = range(0, layers, ceil(layers / _MOST_TICKS))
    figure.colorbar(scale, ax=list(axes), ticks=list(ticks), label="layer of the encoder")
    return figure
