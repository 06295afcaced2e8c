"""What pretraining and fine-tuning do differently. Everything else is in the loop, and is the same for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from crate_mae.data import BadImage
from crate_mae.data.transforms import Preparation
from crate_mae.training.images import RunImages
from crate_mae.training.optimizer import scaled_lr
from crate_mae.training.options import OptionsT
from crate_mae.training.run_directory import RunDirectory

BEST = "best_score"  # the column of metrics.csv with the best score so far, of tasks that compare models

# (model as the accelerator prepared it, images, labels, their place in the global batch) -> mean loss of the images
StepLoss = Callable[[nn.Module, Float[Tensor, "b c hh ww"], Int[Tensor, "b"], slice], Float[Tensor, ""]]


class Task(ABC, Generic[OptionsT]):
    """A model, and how it learns from images.

    The result of the probe is put into `config` before the run begins; the model is saved with a `config` of its own.

    Attributes:
        measures: columns of metrics.csv that `measure` fills, in their order.
        score: the one by which models of a run are compared, more being better; empty keeps the last model.
        learns_labels: whether the result depends on labels.
        ema: decay of the running average of the weights; 0 keeps none.
        bad_held_out: held-out images that cannot be read.
    """

    measures: ClassVar[tuple[str, ...]]
    score: ClassVar[str] = ""
    learns_labels: ClassVar[bool] = False
    ema: float = 0.0
    bad_held_out: Sequence[BadImage]

    def __init__(self, config: OptionsT, images: RunImages, model: nn.Module) -> None:
        self.config = config
        self.images = images
        self.model: Any = model

    @property
    def directory(self) -> RunDirectory:
        """Where the run keeps everything."""
        return RunDirectory(Path(self.config.out))

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the training images."""
        return len(self.images.train) // self.config.batch_size

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def learning_rates(self) -> tuple[float, float]:
        """The highest learning rate, which follows the warm-up, and the final one."""
        return scaled_lr(self.config.lr, self.config.batch_size), scaled_lr(self.config.min_lr, self.config.batch_size)

    def images_seen(self, steps: int) -> int:
        """Distinct images asked for in the first `steps` steps, the held-out ones included."""
        train = len(self.images.train)
        return len(self.images.held_out) + min(train, steps * self.config.batch_size)

    @abstractmethod
    def transform(self) -> Preparation:
        """The augmentation of training images."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """An optimizer of `model`, which is the task's own or a copy.

        The loop sets the learning rate of every group at every step: that of the step, times the group's `lr_scale`.
        """

    @abstractmethod
    def step_loss(self, step: int) -> StepLoss:
        """The loss of one step: a function of (seed, step), however its images are divided among processes."""

    @abstractmethod
    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Measure a model on all held-out images, without changing it; pictures and tables go into the run.

        Returns:
            Values by the names of `measures`; what does not apply is missing.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Describe images, model and input: the entries of the plan that the tasks do not share."""

    @abstractmethod
    def describe_result(self, rows: Sequence[Mapping[str, float | None]]) -> str:
        """Describe the newest result in one sentence, from the rows of metrics.csv."""

    @abstractmethod
    def shorter_commands(self) -> list[str]:
        """Commands to print beside a plan that takes hours."""

    @abstractmethod
    def describe_use(self) -> list[str]:
        """Describe where results are and what to type next, in lines."""


BuildTask = Callable[[Any], Task]  # of a configuration


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluate in the block: no gradients, no stochastic depth, no compiled code (which would be compiled again)."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
