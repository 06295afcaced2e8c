"""When a run saves itself, and how it does so with several processes."""

from __future__ import annotations

import time

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from crate_mae.models.config import ModelConfig
from crate_mae.models.weights import save_tensors
from crate_mae.training import checkpoint
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.config import PretrainConfig
from crate_mae.training.processes import first_decides
from crate_mae.training.run_directory import RunDirectory


class Saver:
    """Writes checkpoints of one model, by the clock and by epochs.

    Args:
        directory: where to.
        config: of the run.
        model: as the accelerator prepared it.
        optimizer: torch's own, not the accelerator's wrapper.
        accelerator: brings the processes together.
        steps_per_epoch: to tell the epoch.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: PretrainConfig,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        steps_per_epoch: int,
    ) -> None:
        self.directory = directory
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.steps_between = config.checkpoint_epochs * steps_per_epoch
        self._saved_at = time.monotonic()

    def is_due_by_clock(self) -> bool:
        """Whether the last checkpoint is long ago; clocks differ, so the first process's answer counts for all."""
        return time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes

    def is_due_by_epoch(self, state: TrainState) -> bool:
        """Whether this step ends an epoch after which to save, or the run."""
        return state.step % self.steps_between == 0 or state.step == self.config.steps

    def save(self, state: TrainState, model_config: ModelConfig) -> None:
        """Write a checkpoint. All processes must call this together."""
        snapshot = checkpoint.gather(self.model, self.optimizer)
        folder = self.directory.checkpoints
        first_decides(self.accelerator, lambda: checkpoint.write(folder, snapshot, model_config, state))
        self._saved_at = time.monotonic()

    def save_model(self, model_config: ModelConfig) -> None:
        """Write the finished model, which marks the run as finished. All processes must call this together."""
        snapshot = checkpoint.gather(self.model, self.optimizer)
        path = self.directory.path
        first_decides(self.accelerator, lambda: save_tensors(snapshot.weights, model_config, path))
