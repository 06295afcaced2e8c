"""What a run writes down about itself: metrics, signals of the layers, pictures, and the same for trackers."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import LoggerType

from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.config import PretrainConfig
from crate_mae.training.monitor import Monitor
from crate_mae.training.run_directory import RunDirectory


class Logbook:
    """Writes rows of metrics.csv at their steps.

    A row holds the mean loss since the row before. The first process measures and writes; all keep the running mean.

    Args:
        directory: where to.
        config: of the run.
        monitor: measures the model on held-out images.
        accelerator: holds the trackers.
        steps_per_epoch: to tell the epoch.

    Attributes:
        images_per_second: speed since the last row, over all processes.
        data_wait: share of the time since the last row that was spent waiting for images.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: PretrainConfig,
        *,
        monitor: Monitor,
        accelerator: Accelerator,
        steps_per_epoch: int,
    ) -> None:
        self.directory = directory
        self.config = config
        self.monitor = monitor
        self.accelerator = accelerator
        self.steps_per_epoch = steps_per_epoch
        self.images_per_second = self.data_wait = 0.0
        self._restart_clock()

    def record(
        self,
        model: MaskedAutoencoder,
        state: TrainState,
        *,
        waited: float,
        lr: float,
        grad_norm: float,
        bad_images: int,
    ) -> None:
        """Note one step: its speed always, a row and held-out signals when they are due.

        Args:
            model: unwrapped.
            state: after the step; its running mean of the loss is emptied into the row.
            waited: seconds that the step spent waiting for images.
            lr: its learning rate.
            grad_norm: its gradient norm before clipping.
            bad_images: unreadable images so far.
        """
        self._steps += 1
        self._waited += waited
        seconds = time.perf_counter() - self._since
        self.images_per_second = self._steps * self.config.batch_size / seconds
        self.data_wait = self._waited / seconds
        last = state.step == self.config.steps
        measures = last or state.step % self.config.monitor_steps == 0
        if not measures and state.step % self.config.log_steps:
            return
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "loss": state.loss_sum / state.loss_count if state.loss_count else "",
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped_steps": state.skipped,
            "bad_images": bad_images,
            "images_per_second": round(self.images_per_second, 1),
            "data_wait": round(self.data_wait, 4),
        }
        state.loss_sum, state.loss_count = 0.0, 0
        if measures:
            row |= self._measure(model, state.step)
        self._write(row)
        self._restart_clock()

    def begin(self, model: MaskedAutoencoder) -> None:
        """Write the row of step 0: what the untrained model does."""
        self._write({"step": 0, "epoch": 0.0, **self._measure(model, 0)})
        self._restart_clock()

    def _measure(self, model: MaskedAutoencoder, step: int) -> dict[str, float]:
        if not self.accelerator.is_main_process:
            return {}
        signals = self.monitor.measure(model)
        self.directory.layers.append([{"step": step, **signal._asdict()} for signal in signals.layers])
        self.monitor.picture(model, self.directory.path / "pictures" / f"step-{step}.png")
        return {"held_out_loss": signals.held_out_loss, "feature_rank": signals.feature_rank}

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.directory.metrics.append([row])
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self.accelerator.log(numbers, step=row["step"])

    def _restart_clock(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0


def choose_trackers(asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The trackers to use: those asked for; if nobody asked, TensorBoard where it is installed.

    Raises:
        UserError: for a tracker that Accelerate does not know or that is not installed.
    """
    if asked is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in asked:
        if name not in known:
            raise UserError(f"Unknown tracker {name}: --trackers takes {', '.join(known)}.")
        if importlib.util.find_spec(name) is None:
            extra = f"'crate-mae[{name}]'" if name in ("tensorboard", "wandb") else name
            raise UserError(f"The tracker {name} is not installed: pip install {extra}")
    return asked


def start_trackers(accelerator: Accelerator, config: PretrainConfig, run: Path, start_step: int) -> None:
    """Start the accelerator's trackers, and have TensorBoard forget what it was told beyond `start_step`."""
    if config.trackers:
        options = {"tensorboard": {"purge_step": start_step + 1}, "wandb": {"name": run.name}}
        accelerator.init_trackers("", init_kwargs={name: options.get(name, {}) for name in config.trackers})
