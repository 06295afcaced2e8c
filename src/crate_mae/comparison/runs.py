"""The runs of a comparison: a search for each contestant's learning rate, then the final runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_mae.comparison.contestants import Contestant
from crate_mae.comparison.costs import Costs
from crate_mae.comparison.course import Course, next_rate
from crate_mae.comparison.directory import ComparisonDirectory
from crate_mae.comparison.options import Options
from crate_mae.errors import DivergedError, UserError
from crate_mae.training.run_directory import Run, RunDirectory
from crate_mae.training.start import start

_SEARCH_SEED = 0


@dataclass(frozen=True)
class Moment:
    """A measurement during a run.

    Attributes:
        minutes: of training until then; measuring is not counted, nor are steps that were lost to an interruption.
        images: seen until then.
        held_out_loss: on images of the training data that are not trained on.
    """

    minutes: float
    images: int
    held_out_loss: float


@dataclass(frozen=True)
class Trained:
    """A contestant after its runs.

    Attributes:
        rate: the learning rate that was chosen, per 256 images.
        search_losses: held-out loss by learning rate, infinite where a run did not stay finite; empty without a search.
        search_minutes: of training in the search.
        runs: folders of the final runs, one a seed.
        curves: their measurements.
    """

    rate: float
    search_losses: dict[float, float]
    search_minutes: float
    runs: list[Path]
    curves: list[list[Moment]]

    @property
    def is_rate_at_edge(self) -> bool:
        """Whether a better learning rate may lie beyond those that were tried."""
        return len(self.search_losses) > 1 and self.rate in (min(self.search_losses), max(self.search_losses))


Say = Callable[[str], object]


class Trainer:
    """Trains contestants one after another: two at a time would slow each other down.

    A run that is finished is taken as it is, and one that is not is resumed, so training again costs nothing.

    Args:
        options: of the comparison.
        directory: where the runs are kept.
        say: is told what happens.
    """

    def __init__(self, options: Options, directory: ComparisonDirectory, say: Say) -> None:
        self.options = options
        self.directory = directory
        self.say = say

    def train_all(
        self, contestants: Sequence[Contestant], costs: Sequence[Costs], courses: Sequence[Course]
    ) -> list[Trained]:
        """Search for every contestant, then train all of them with the first seed, then with the next.

        Raises:
            UserError: if no learning rate, or a final run, stays finite; or for a reason to stop a run.
            RunStopped: after SIGINT or SIGTERM, when everything has been saved.
        """
        plans = list(zip(contestants, costs, courses, strict=True))
        found = [self._search(*plan) for plan in plans]
        rates = [_best(contestant, losses) for contestant, (losses, _) in zip(contestants, found, strict=True)]
        runs: list[list[Run]] = [[] for _ in plans]
        for seed in range(self.options.seeds):
            for (contestant, cost, course), rate, of_one in zip(plans, rates, runs, strict=True):
                out = self.directory.final_run(contestant.name, seed)
                self._announce(f"{contestant.name}: final run, seed {seed}", out, course.final_steps, rate)
                of_one.append(self._run(contestant, cost, out, lr=rate, steps=course.final_steps, seed=seed))
        return [
            Trained(
                rate=rate,
                search_losses=losses if len(losses) > 1 else {},
                search_minutes=minutes,
                runs=[run.path for run in of_one],
                curves=[curve(run) for run in of_one],
            )
            for rate, (losses, minutes), of_one in zip(rates, found, runs, strict=True)
        ]

    def _search(self, contestant: Contestant, costs: Costs, course: Course) -> tuple[dict[float, float], float]:
        """Held-out loss by learning rate, and the minutes of training; without a search, the only rate."""
        if not course.tries:
            return {course.first_rate: 0.0}, 0.0
        losses: dict[float, float] = {}
        minutes = 0.0
        for _ in range(course.tries):
            rate = next_rate(losses, course.first_rate)
            if rate in losses:  # closer than three digits can tell
                break
            out = self.directory.search_run(contestant.name, rate)
            self._announce(f"{contestant.name}: search", out, course.search_steps, rate)
            try:
                run = self._run(contestant, costs, out, lr=rate, steps=course.search_steps, seed=_SEARCH_SEED)
            except DivergedError:
                self.say(f"{contestant.name}: did not stay finite at {rate:.3g}")
                losses[rate] = math.inf
                continue
            moments = curve(run)
            minutes += moments[-1].minutes
            loss = moments[-1].held_out_loss
            losses[rate] = loss if math.isfinite(loss) else math.inf
        return losses, minutes

    def _announce(self, what: str, out: Path, steps: int, rate: float) -> None:
        done = " (done before)" if RunDirectory(out).is_finished else ""
        self.say(f"{what}, {steps:,} steps at {rate:.3g}{done}")

    def _run(self, contestant: Contestant, costs: Costs, out: Path, **settings: Any) -> Run:
        c = contestant.config
        options = self.options.pretraining(
            contestant.name,
            **settings,
            out=out,
            batch_size=c.batch_size,
            image_size=c.image_size,
            channels=c.channels,
            mean=c.mean,
            std=c.std,
            precision=costs.precision,
            workers=c.workers,
            threads=c.threads,
        )
        return start(options, on_progress=lambda line: self.say(f"    {line}"))


def curve(run: Run) -> list[Moment]:
    """The measurements of a run, from before its first step to after its last."""
    moments, seconds, step, batch = [], 0.0, 0, run.config.batch_size
    for row in run.metrics():
        now, speed = int(row["step"] or 0), row["images_per_second"]
        seconds += (now - step) * batch / speed if speed else 0.0
        step = now
        if (loss := row["held_out_loss"]) is not None:
            moments.append(Moment(seconds / 60, step * batch, loss))
    return moments


def _best(contestant: Contestant, losses: dict[float, float]) -> float:
    rate = min(losses, key=lambda rate: losses[rate])
    if math.isinf(losses[rate]):
        tried = ", ".join(f"{rate:.3g}" for rate in losses)
        raise UserError(f"{contestant.name} stays finite at none of the learning rates {tried}: it cannot be compared.")
    return rate
