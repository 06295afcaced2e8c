"""What a run writes down about itself: rows of metrics.csv, and the same for trackers such as TensorBoard."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import LoggerType

from crate_mae.errors import UserError, install_command
from crate_mae.training.checkpoint import TrainState, check_state
from crate_mae.training.model_state import ModelState
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import first_decides
from crate_mae.training.report import RunReport
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.task import Task

BEST = "best_score"  # the column with the best score so far


class Logbook:
    """Writes rows of metrics.csv at their steps.

    A row holds the mean loss since the row before. The first process measures and writes; all keep the running mean.

    Args:
        directory: of the run.
        task: measures the model on held-out images.
        accelerator: holds the trackers.
        report: is updated after each row.

    Attributes:
        images_per_second: speed since the last row, over all processes.
        data_wait: share of the time since the last row that was spent waiting for images.
    """

    def __init__(self, directory: RunDirectory, task: Task, accelerator: Accelerator, report: RunReport) -> None:
        self.directory = directory
        self.report = report
        self.table = directory.metrics(task.measures)
        self.task = task
        self.accelerator = accelerator
        if accelerator.is_main_process:
            self.table.widen()
        self.images_per_second = self.data_wait = 0.0
        self._restart_clock()

    def record(self, model_state: ModelState, state: TrainState, row: dict[str, float], *, waited: float) -> bool:
        """Note one step: its speed always, a row and a measurement on held-out images when they are due.

        Args:
            model_state: to measure.
            state: after the step; its running mean of the loss is emptied into the row, and its best score noted.
            row: what the row says of the step itself.
            waited: seconds that this process spent waiting for images of the step.

        Returns:
            Whether the model has just been measured, and is the best so far.
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
        check_state(self.accelerator, model_state, self.directory, step)
        with model_state.measured(self.accelerator) as model:
            return first_decides(self.accelerator, lambda: self.task.measure(model, step, self.directory))

    def _write(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.directory.check_present()
            self.table.append([row])
        values = {key: value for key, value in row.items() if key != "step"}
        self.accelerator.log(values, step=int(row["step"]))

    def _restart_clock(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0


def choose_trackers(asked: str | Sequence[str] | None, origin: str = "") -> tuple[str, ...]:
    """The trackers to use: those asked for; by default TensorBoard if it is installed.

    Args:
        asked: their names.
        origin: of the option; see `options.origin`.

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
    next row or by closing, and is explained there.
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
