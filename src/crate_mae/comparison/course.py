"""How a budget becomes steps: those of each try in the search for a learning rate, and those of the final run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from crate_mae.comparison.costs import Costs
from crate_mae.comparison.options import Budget
from crate_mae.errors import UserError

_FACTOR = 3.0


@dataclass(frozen=True)
class Course:
    """What one contestant does with its budget.

    Attributes:
        first_rate: learning rate per 256 images that is tried first; `next_rate` says which come after it.
        tries: how many learning rates are tried; 0 takes the first as it is.
        search_steps: of each try.
        final_steps: of the final run, and of each further seed's.
    """

    first_rate: float
    tries: int
    search_steps: int
    final_steps: int


def plan_course(
    budget: Budget,
    costs: Costs,
    *,
    name: str,
    batch_size: int,
    workers: int,
    first_rate: float,
    tries: int,
    share: float,
) -> Course:
    """Divide a contestant's budget.

    Args:
        budget: of every contestant.
        costs: of this one.
        name: of this one.
        batch_size: images a step.
        workers: processes that load images.
        first_rate: learning rate to begin with.
        tries: learning rates to try; with one there is nothing to choose.
        share: of the budget for the search, in equal parts for every try.

    Raises:
        UserError: if it is too small.
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
            f"{share:.0%} of them.\nGive a larger budget, or do without the search: --lr-search 1"
        )
    return Course(first_rate, tries, search, steps - tries * search)


def next_rate(losses: Mapping[float, float], first: float) -> float:
    """The learning rate to try after those that were, to three digits.

    The loss leads: three times the highest rate while that is the best and finite, a third of the lowest while that is
    the best. Once the best has a worse one on either side, the next lies between it and the better of these two.

    Args:
        losses: by the learning rates that were tried.
        first: to begin with.
    """
    if not losses:
        return first
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    place = rates.index(best)
    if place == len(rates) - 1 and math.isfinite(losses[best]):
        rate = rates[-1] * _FACTOR
    elif place == 0:
        rate = rates[0] / _FACTOR
    else:
        neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: losses[rate])
        rate = math.sqrt(best * neighbour)
    return float(f"{rate:.3g}")
