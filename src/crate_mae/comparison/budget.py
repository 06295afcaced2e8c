"""From a budget to training steps: the costs of each entry, the steps they allow, and the learning rates to try."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from crate_mae.comparison.entries import Entry
from crate_mae.comparison.options import Budget
from crate_mae.costs.memory import step_memory
from crate_mae.costs.trial import TrialStep
from crate_mae.data import ImageSource
from crate_mae.errors import UserError
from crate_mae.training.precision import WORTHWHILE, multiplies_in_bfloat16
from crate_mae.training.preflight import loading_seconds

_ROUNDS = 11
_LEAST_ROUNDS = 3
_MOST_SECONDS = 60.0  # of all rounds, once there are enough of them
_RATE_FACTOR = 3.0  # between neighbouring learning rates, as long as the best is at the edge


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The measured costs of one entry.

    Attributes:
        parameters: trainable parameters of encoder and decoder.
        encoder_parameters: those of the encoder alone, which the probes use.
        encoder_flops: of encoding one image with nothing hidden.
        training_flops: of one image in training, forward and backward.
        precision: of training.
        step_seconds: one step with its images in memory, the median over rounds.
        loading_seconds: to read and prepare the images of a step, by all loader processes together.
        memory: peak memory of a step in bytes; None if unknown.
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
        """Seconds of a step with its images: the slower of both with loader processes, otherwise the sum."""
        if workers == 0:
            return self.step_seconds + self.loading_seconds
        return max(self.step_seconds, self.loading_seconds)


def measure_costs(entries: Sequence[Entry], train: ImageSource, device: torch.device) -> list[Costs]:
    """Measure the costs of all entries on this machine, with their steps timed in turns.

    Args:
        entries: with the same batch size and number of loader processes.
        train: their training images.
        device: where they are trained.
    """
    wanted = entries[0].config.precision
    able = ["float32", "bfloat16"] if multiplies_in_bfloat16(device) else ["float32"]
    tried = able if wanted == "auto" else [wanted]
    trials = [[TrialStep(e.model, e.step_settings(precision), device) for precision in tried] for e in entries]
    seconds = iter(seconds_in_turns([trial for of_entry in trials for trial in of_entry]))
    config = entries[0].config
    loading = loading_seconds(train, entries[0].augmentation) * config.batch_size / max(1, config.workers)
    costs = []
    for entry, of_entry in zip(entries, trials, strict=True):
        times = dict(zip(tried, seconds, strict=False))
        precision = _precision(times)
        memory = step_memory(entry.model, entry.step_settings(precision), device, entry.config.threads)
        batch, model = entry.config.batch_size, of_entry[0].model
        costs.append(
            Costs(
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                encoder_parameters=sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
                encoder_flops=of_entry[0].encoder_flops() / batch,
                training_flops=of_entry[0].training_flops() / batch,
                precision=precision,
                step_seconds=times[precision],
                loading_seconds=loading,
                memory=memory,
            )
        )
    return costs


def seconds_in_turns(trials: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of each trial, run in turns so that a busy machine slows all of them alike."""
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
    """The faster precision; the first one unless another is clearly faster."""
    if len(times) > 1 and times["float32"] / times["bfloat16"] > WORTHWHILE:
        return "bfloat16"
    return next(iter(times))


@dataclass(frozen=True)
class BudgetPlan:
    """How one entry spends its budget.

    Attributes:
        first_rate: learning rate per 256 images that is tried first; `next_rate` chooses the following ones.
        tries: number of learning rates to try; 0 uses the first without a search.
        search_steps: steps of each try.
        final_steps: steps of the final run of each seed.
    """

    first_rate: float
    tries: int
    search_steps: int
    final_steps: int


def plan_budget(
    budget: Budget,
    costs: Costs,
    *,
    name: str,
    batch_size: int,
    workers: int,
    first_rate: float,
    tries: int,
    share: float,
) -> BudgetPlan:
    """Divide the budget of an entry into the steps of the search and of the final run.

    Args:
        budget: of every entry.
        costs: of this entry.
        name: of this entry.
        batch_size: images per step.
        workers: processes that load images.
        first_rate: learning rate that is tried first.
        tries: number of learning rates to try; 1 means no search.
        share: of the budget for the search, divided equally among the tries.

    Raises:
        UserError: if the budget is too small.
    """
    per_step = {
        "steps": 1.0,
        "minutes": costs.seconds_per_step(workers) / 60,
        "flops": costs.training_flops * batch_size,
    }[budget.kind]
    steps = int(budget.amount / per_step)
    if steps < 1:
        raise UserError(
            f"--budget {budget} is too small for one step of {name}, which takes {budget.kind}={per_step:.3g}."
        )
    tries = tries if tries > 1 else 0
    search = int(steps * share / tries) if tries else 0
    if tries and (search < 1 or steps - tries * search < 1):
        raise UserError(
            f"--budget {budget} gives {name} {steps} step(s): too few for a search over {tries} learning rates with "
            f"{share:.0%} of them.\nGive a larger budget, or skip the search with --lr-search 1"
        )
    return BudgetPlan(first_rate, tries, search, steps - tries * search)


def next_rate(losses: Mapping[float, float], first: float) -> float:
    """The learning rate to try next, to three digits.

    It follows the loss: three times the highest rate while that is the best and finite, a third of the lowest while
    that is the best. Once the best rate has a worse one on both sides, the next lies between it and the better of the
    two.

    Args:
        losses: loss by learning rate, of the rates tried so far.
        first: the first rate to try.
    """
    if not losses:
        return first
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    place = rates.index(best)
    if place == len(rates) - 1 and math.isfinite(losses[best]):
        rate = rates[-1] * _RATE_FACTOR
    elif place == 0:
        rate = rates[0] / _RATE_FACTOR
    else:
        neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: losses[rate])
        rate = math.sqrt(best * neighbour)
    return float(f"{rate:.3g}")
