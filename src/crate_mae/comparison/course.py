"""How a budget becomes steps: those of each try in the search for a learning rate, and those of the final run."""

from collections.abc import Sequence
from dataclasses import dataclass

from crate_mae.comparison.costs import Costs
from crate_mae.comparison.options import Budget
from crate_mae.errors import UserError

_GRID_FACTOR = 3.0


@dataclass(frozen=True)
class Course:
    """What one contestant does with its budget.

    Attributes:
        rates: learning rates per 256 images that are tried; a single one is simply taken.
        search_steps: of each try; 0 if there is nothing to choose.
        final_steps: of the final run, and of each further seed's.
    """

    rates: tuple[float, ...]
    search_steps: int
    final_steps: int


def plan_course(
    budget: Budget, costs: Costs, *, name: str, batch_size: int, workers: int, rates: Sequence[float], share: float
) -> Course:
    """Divide a contestant's budget.

    Args:
        budget: of every contestant.
        costs: of this one.
        name: of this one.
        batch_size: images a step.
        workers: processes that load images.
        rates: learning rates to try.
        share: of the budget for the search, in equal parts for every rate.

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
    tries = len(rates) if len(rates) > 1 else 0
    search = int(steps * share / tries) if tries else 0
    if tries and (search < 1 or steps - tries * search < 1):
        raise UserError(
            f"--budget {budget} gives {name} {steps} step(s): too few for a search over {tries} learning rates with "
            f"{share:.0%} of them.\nGive a larger budget, or do without the search: --lr-search 1"
        )
    return Course(tuple(rates), search, steps - tries * search)


def rate_grid(default: float, candidates: int) -> tuple[float, ...]:
    """Learning rates around a default, each three times the one before, to three digits."""
    middle = (candidates - 1) / 2
    return tuple(float(f"{default * _GRID_FACTOR ** (i - middle):.3g}") for i in range(candidates))
