"""What a run shows while it goes on: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class Display:
    """Lines before and after a run, and its progress in between; all of it goes to the log as well.

    Args:
        console: where to show it; None shows nothing.
        on_progress: is called with a line about the step, twice a minute.
    """

    def __init__(self, console: Console | None, on_progress: Callable[[str], object] | None = None) -> None:
        self.console = console
        self.on_progress = on_progress
        self._bar: Progress | None = None
        self._last_line = 0.0

    def lines(self, lines: Sequence[str]) -> None:
        """Show some lines."""
        for line in lines:
            logger.info("%s", line)
            if self.console is not None:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def training(self, step: int, total_steps: int) -> Iterator[None]:
        """Show the progress of a block that begins at `step`."""
        self._started, self._first_step, self._total_steps = time.monotonic(), step, total_steps
        self._last_line = self._started
        if self.console is None or not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as self._bar:
                self._task = self._bar.add_task("starting", total=total_steps, completed=step)
                yield
        finally:
            self._bar = None

    def step(self, step: int, loss: float, images_per_second: float, data_wait: float) -> None:
        """Show one step: its loss, images per second, and the share of time spent waiting for images."""
        text = f"loss {loss:.4f}  {images_per_second:,.0f} images/s  data wait {data_wait:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=step)
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / (step - self._first_step) * (self._total_steps - step)
            line = f"step {step:,} of {self._total_steps:,}  {text}  {duration(left)} left"
            logger.info("%s", line)
            if self.on_progress is not None:
                self.on_progress(line)
            if self._bar is None and self.console is not None:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def count(number: int, noun: str) -> str:
    """A number of things for people: "1 step", "1,200 steps", "2 processes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def duration(seconds: float) -> str:
    """A length of time for people: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
