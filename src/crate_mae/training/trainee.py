"""What a run trains: the model, its optimizer, and a running average of the weights where one is kept."""

from __future__ import annotations

from dataclasses import dataclass

from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

_POWER = 0.75  # timm's for all but the longest runs: the decay is 1 - steps^-0.75 until it reaches its final value


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Attributes:
        model: as the accelerator prepared it.
        plain: the model itself.
        optimizer: torch's own, which is saved.
        accelerated: the accelerator's wrapper of it, which steps.
        average: of the plain model's weights over the last steps; None if none is kept.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: Optimizer
    accelerated: Optimizer
    average: ModelEmaV3 | None = None

    @property
    def measured(self) -> nn.Module:
        """The plain model that is measured and kept in the end: the average if there is one."""
        return self.plain if self.average is None else self.average.module

    def move_average(self, step: int) -> None:
        """Let the average follow, after the given number of steps."""
        if self.average is not None:
            self.average.update(self.plain, step=step)


def average_of(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """An average that begins at the model as it is, or none for a decay of 0.

    At first it forgets faster than `decay` says, so that the average of a short run is not that of untrained weights.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=_POWER) if decay else None
