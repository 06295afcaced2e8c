"""A run as Python sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crate_mae.training.options import RunOptions
from crate_mae.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from crate_mae.models.weights import Model


@dataclass(frozen=True)
class Run:
    """What `pretrain`, `finetune` and `resume` return.

    Attributes:
        path: the run's folder.
        config: its resolved options.
    """

    path: Path
    config: RunOptions

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return RunDirectory(self.path).resume_command

    def model(self) -> Model:
        """The finished model; of a run that is not finished, the model of its newest checkpoint.

        Raises:
            UserError: if the run has neither yet.
        """
        from crate_mae.models.weights import load

        return load(self.path)

    def metrics(self) -> list[dict[str, float | None]]:
        """The rows of metrics.csv; a value that was not measured at a step is None."""
        rows = RunDirectory(self.path).metrics().read()
        return [{key: float(value) if value else None for key, value in row.items()} for row in rows]
