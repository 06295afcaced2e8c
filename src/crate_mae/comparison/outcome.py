"""What came of each contestant, in numbers with names: what tables, notes and figures are made of."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crate_mae.comparison.contestants import Contestant
from crate_mae.comparison.costs import Costs
from crate_mae.comparison.course import Course
from crate_mae.comparison.runs import Trained

# score: whether more is better
SCORES = {"linear": True, "knn": True, "psnr": True, "ssim": True, "mse": False}
PROBES = ("linear", "knn")


@dataclass(frozen=True)
class Spread:
    """One score over seeds.

    Attributes:
        mean: over seeds.
        std: sample standard deviation; None for one seed.
        low: the smallest.
        high: the largest.
        count: seeds.
    """

    mean: float
    std: float | None
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contestant, from its costs to its scores.

    Attributes:
        contestant: as it was trained.
        costs: as they were measured before.
        course: how its budget was divided.
        trained: what its runs gave.
        scores: of each seed's final run.
        random: of the same weights before the first step; empty dictionaries without labels.
    """

    contestant: Contestant
    costs: Costs
    course: Course
    trained: Trained
    scores: Sequence[dict[str, float]]
    random: Sequence[dict[str, float]]

    @property
    def name(self) -> str:
        """Of the preset."""
        return self.contestant.name

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.contestant.config.batch_size

    @property
    def steps(self) -> int:
        """Of the search and one final run."""
        return len(self.trained.search_losses) * self.course.search_steps + self.course.final_steps

    @property
    def final_minutes(self) -> float:
        """Of training in the final run, the mean over seeds."""
        return statistics.fmean(curve[-1].minutes for curve in self.trained.curves)

    @property
    def minutes(self) -> float:
        """Of training in the search and one final run."""
        return self.trained.search_minutes + self.final_minutes

    @property
    def training_flops(self) -> float:
        """Of the search and one final run."""
        return self.costs.training_flops * self.batch_size * self.steps

    @property
    def images_per_second(self) -> float:
        """In training, with images in memory."""
        return self.batch_size / self.costs.step_seconds

    def numbers(self) -> dict[str, float | int | None]:
        """What does not depend on the seed, by the names in `table.csv`."""
        return {
            "parameters_encoder": self.costs.encoder_parameters,
            "parameters": self.costs.parameters,
            "encoder_flops_per_image": self.costs.encoder_flops,
            "training_flops_per_image": self.costs.training_flops,
            "images_per_second": self.images_per_second,
            "peak_memory_bytes": self.costs.memory,
            "steps_search": len(self.trained.search_losses) * self.course.search_steps,
            "steps": self.course.final_steps,
            "images_seen": self.course.final_steps * self.batch_size,
            "minutes_search": self.trained.search_minutes,
            "minutes": self.final_minutes,
            "training_flops": self.training_flops,
            "lr": self.trained.rate,
        }


def spread(scores: Sequence[dict[str, float]], name: str) -> Spread | None:
    """One score over seeds; None if it was not measured."""
    values = [of_seed[name] for of_seed in scores if name in of_seed]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, min(values), max(values), len(values))
