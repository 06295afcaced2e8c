"""When a run saves itself, and how it does so with several processes."""

from __future__ import annotations

import time

from accelerate import Accelerator

from crate_mae.models.tensors import read_tensors
from crate_mae.models.weights import WEIGHTS_FILE, save_tensors
from crate_mae.training import checkpoint
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.processes import first_decides
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.sharding import whole_weights
from crate_mae.training.task import Task
from crate_mae.training.trainee import Trainee


class Saver:
    """Writes checkpoints of one model, by the clock and by epochs.

    Args:
        directory: where to.
        task: tells the epoch.
        trainee: what is saved.
        accelerator: brings the processes together.
    """

    def __init__(self, directory: RunDirectory, task: Task, *, trainee: Trainee, accelerator: Accelerator) -> None:
        self.directory = directory
        self.task = task
        self.config = task.config
        self.trainee = trainee
        self.accelerator = accelerator
        self.steps_between = task.config.checkpoint_epochs * task.steps_per_epoch
        self._saved_at = time.monotonic()

    def is_due_by_clock(self) -> bool:
        """Whether the last checkpoint is long ago; clocks differ, so the first process's answer counts for all."""
        return time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes

    def is_due_by_epoch(self, state: TrainState) -> bool:
        """Whether this step ends an epoch after which to save, or the run."""
        return state.step % self.steps_between == 0 or state.step == self.config.steps

    def save(self, state: TrainState) -> None:
        """Write a checkpoint. All processes must call this together."""
        snapshot, config = checkpoint.gather(self.trainee), self.task.model.config
        folder = self.directory.checkpoints
        if self.trainee.is_sharded:
            checkpoint.write_parts(self.accelerator, folder, snapshot, config, state)
        else:
            first_decides(self.accelerator, lambda: checkpoint.write(folder, snapshot, config, state))
        self._saved_at = time.monotonic()

    def save_model(self, state: TrainState) -> None:
        """Write the finished model, which marks the run as finished. All processes must call this together.

        It is the best one where models were compared, and otherwise the last one.
        """
        last, config = whole_weights(self.trainee.kept), self.task.model.config

        def write() -> None:
            best = None if state.best_score is None else self.directory.checkpoints / f"step-{state.best_step}"
            tensors = last if best is None else read_tensors(best / WEIGHTS_FILE)
            save_tensors(tensors, config, self.directory.path)

        first_decides(self.accelerator, write)
