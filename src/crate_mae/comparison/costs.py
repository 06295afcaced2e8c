"""What a training step of each contestant costs: measured on this machine, in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crate_mae.comparison.contestants import Contestant
from crate_mae.costs.memory import step_memory
from crate_mae.costs.trial import TrialStep
from crate_mae.data import ImageSource, UnreadableImage
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.data.facts import fixed_sample
from crate_mae.training.precision import WORTHWHILE, multiplies_in_bfloat16

_ROUNDS = 11
_LEAST_ROUNDS = 3
_MOST_SECONDS = 60.0  # of all rounds, once there are enough of them
_READ_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one contestant costs.

    Attributes:
        parameters: that are trained, encoder and decoder.
        encoder_parameters: those of the encoder alone, which is what the probes use.
        encoder_flops: of encoding one image with nothing hidden.
        training_flops: of one image in training, forward and backward.
        precision: that training computes in.
        step_seconds: one step with its images in memory, the median over rounds.
        loading_seconds: reading and preparing the images of a step, by all loader processes together.
        memory: bytes at the peak of a step; None if not known.
    """

    parameters: int
    encoder_parameters: int
    encoder_flops: float
    training_flops: float
    precision: str
    step_seconds: float
    loading_seconds: float
    memory: int | None

    def seconds_per_step(self, workers: int) -> float:
        """A step with its images: loaders work meanwhile, so the slower of both counts; without them, the sum."""
        if workers == 0:
            return self.step_seconds + self.loading_seconds
        return max(self.step_seconds, self.loading_seconds)


def measure_costs(contestants: Sequence[Contestant], train: ImageSource, device: torch.device) -> list[Costs]:
    """Measure all contestants.

    Args:
        contestants: with the same batch size and number of loader processes.
        train: what they are trained on.
        device: where they are trained.
    """
    wanted = contestants[0].config.precision
    able = ["float32", "bfloat16"] if multiplies_in_bfloat16(device) else ["float32"]
    tried = able if wanted == "auto" else [wanted]
    trials = [[TrialStep(c.model, c.step_settings(precision), device) for precision in tried] for c in contestants]
    seconds = iter(seconds_in_turns([trial for of_one in trials for trial in of_one]))
    loading = _loading_seconds(contestants[0], train)
    costs = []
    for contestant, of_one in zip(contestants, trials, strict=True):
        times = dict(zip(tried, seconds, strict=False))
        precision = _precision(times)
        memory = step_memory(contestant.model, contestant.step_settings(precision), device, contestant.config.threads)
        batch, model = contestant.config.batch_size, of_one[0].model
        costs.append(
            Costs(
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                encoder_parameters=sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
                encoder_flops=of_one[0].encoder_flops() / batch,
                training_flops=of_one[0].training_flops() / batch,
                precision=precision,
                step_seconds=times[precision],
                loading_seconds=loading,
                memory=memory,
            )
        )
    return costs


def seconds_in_turns(trials: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of each: one step of every trial a round, so that a busy machine is busy for all of them."""
    for trial in trials:
        trial()
        trial()
    times: list[list[float]] = [[] for _ in trials]
    started = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - started > _MOST_SECONDS:
            break
        for trial, seconds in zip(trials, times, strict=True):
            seconds.append(trial())
    return [statistics.median(seconds) for seconds in times]


def _precision(times: dict[str, float]) -> str:
    """The faster one, by precision."""
    if len(times) > 1 and times["float32"] / times["bfloat16"] > WORTHWHILE:
        return "bfloat16"
    return next(iter(times))


def _loading_seconds(contestant: Contestant, train: ImageSource) -> float:
    """Seconds for the images of a step, from a fixed sample of them."""
    times = []
    for i in fixed_sample(len(train), _READ_IMAGES):
        started = time.perf_counter()
        try:
            image = train.read(i)
        except UnreadableImage:
            continue
        with default_generator_seeded(0):
            contestant.augmentation(image)
        times.append(time.perf_counter() - started)
    config = contestant.config
    return statistics.median(times) * config.batch_size / max(1, config.workers)
