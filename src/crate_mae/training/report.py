"""The page of a run, `report.html`: how far it has come, what held-out images say, and what it is."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from crate_mae.data.files import write_whole
from crate_mae.training.progress import duration
from crate_mae.training.run import Run
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.run_figures import Row, curve, draw_layer_signals, draw_learning
from crate_mae.training.task import Task

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 30.0
_SHARE_OF_TIME = 0.01
_RECENT_ROWS = 5  # whose speed tells the time that is left


class RunReport:
    """Keeps the page of a run up to date, without holding up the run.

    It is drawn when held-out images have been measured, but at most every half minute and for at most a hundredth of
    the run's time; and once more when the run ends, however it ends. A page that cannot be drawn is a warning in the
    log, and the run goes on.

    Args:
        directory: of the run.
        task: says what is learned.
        plan: what was shown when the run started, one line a fact.
        writes: whether this process writes the page, as only the first of them does.
    """

    def __init__(self, directory: RunDirectory, task: Task, plan: Sequence[str], *, writes: bool) -> None:
        self.directory = directory
        self.task = task
        self.plan = plan
        self.writes = writes
        self._due = time.monotonic() + _SECONDS_BETWEEN

    def update(self, step: int) -> None:
        """Draw the page if this step has measured held-out images and the last page is old enough."""
        if step % self.task.config.monitor_steps == 0 and time.monotonic() >= self._due:
            self._write()

    def close(self) -> None:
        """Draw the page for the last time."""
        self._write()

    def _write(self) -> None:
        if not self.writes:
            return
        started = time.monotonic()
        try:
            write_whole(self.directory.report, write_page(self.directory, self.task, self.plan).encode())
        except Exception:  # whatever it is, it is not worth a run
            logger.warning("%s could not be written; the run goes on without it.", self.directory.report, exc_info=True)
        ended = time.monotonic()
        self._due = ended + max(_SECONDS_BETWEEN, (ended - started) / _SHARE_OF_TIME)


def write_page(directory: RunDirectory, task: Task, plan: Sequence[str]) -> str:
    """The page as HTML, from what the run has written down so far.

    Args:
        directory: of the run.
        task: says what is learned.
        plan: see `RunReport`.
    """
    from crate_mae.drawing.page import page

    rows = Run(directory.path, task.config).metrics()
    written = f"Written {datetime.now().isoformat(sep=' ', timespec='seconds')}."
    content = f"""<p class="glance">{_progress(task, directory, rows)}</p>
<p class="small">{written}{"" if directory.is_finished else " Reload the page for news."}</p>
{_figures(directory, rows)}
<h2>The run</h2>
<ul>{"".join(map(_fact, plan))}</ul>
<details><summary>All options</summary>
<div class="wide"><pre>{escape(directory.config_file.read_text(encoding="utf-8"))}</pre></div></details>
<footer><p>The numbers are in <code>metrics.csv</code> and <code>layers.csv</code>, all pictures in
<code>pictures/</code>. {_environment(directory)}</p></footer>"""
    return page(f"crate-mae {task.config.command}: {directory.path.resolve().name}", content)


def _progress(task: Task, directory: RunDirectory, rows: Sequence[Row]) -> str:
    """How far the run has come, and the newest result."""
    if not rows:
        return "Nothing has been measured yet."
    config = task.config
    step, speeds = int(rows[-1]["step"] or 0), curve(rows, "images_per_second").values[-_RECENT_ROWS:]
    said = f"Finished: {step:,} steps." if directory.is_finished else f"Step {step:,} of {config.steps:,}."
    if speeds and not directory.is_finished and (speed := statistics.median(speeds)) > 0:
        seconds = (config.steps - step) * config.batch_size / speed
        said += f" At {speed:,.0f} images per second, {duration(seconds)} are left."
    if curve(rows, task.measures[0]).steps:
        said += " " + task.describe_end([dict(row) for row in rows], directory.path)[0]
    return escape(said)


def _figures(directory: RunDirectory, rows: Sequence[Row]) -> str:
    """Curves of the run and of the layers, and the newest picture, as far as they are there."""
    from crate_mae.drawing.page import figure
    from crate_mae.drawing.style import encode

    parts = []
    if rows:
        picture = encode(draw_learning(rows), "png")
        parts += ["<h2>Learning</h2>", figure(picture, "Training loss: mean since the row before.", "Curves by step")]
    if layers := directory.layers.read():
        picture = encode(draw_layer_signals(layers), "png")
        caption = "Of held-out images of which nothing is hidden. R<sup>c</sup> as the official code takes it."
        parts += ["<h2>Layers</h2>", figure(picture, caption, "Subspace rate and sparsity of every layer, by step")]
    if newest := directory.newest_picture():
        step, path = newest
        caption = f"Held-out images at step {step:,}."
        parts += ["<h2>Completed images</h2>", figure(path.read_bytes(), caption)]
    return "\n".join(parts)


def _fact(line: str) -> str:
    """A line of the plan, which is a key, spaces, and what there is to say."""
    key, _, said = line.partition("  ")
    return f"<li><strong>{escape(key)}</strong>: {escape(said.strip())}</li>\n"


def _environment(directory: RunDirectory) -> str:
    """Versions and machine, of the last start."""
    found: dict[str, Any] = json.loads((directory.path / "environment.json").read_text(encoding="utf-8"))
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
    return escape(f"Python {found['python']}, {', '.join(packages)}; {found['system']}, {found['cpus']} CPUs{gpus}.")
