"""The runs of a comparison: a search for each entry, then the final runs, kept so that they can resume.

DIR/
    comparison.yaml     all options, the measured costs, the plans, machine and versions
    runs/MODEL/         or MODEL,depth=3 of an entry with settings
        search-0.001/   a run of the search, named after its learning rate; all runs are those of `crate-mae pretrain`
        seed-0/         the final runs
    scores.json         scores of the final runs and of the controls
    SHA256SUMS          digests of comparison.yaml and scores.json
    table.csv  seeds.csv  table.md  figure.png  curves.png
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crate_mae.comparison.entries import BudgetPlan, Costs, Entry
from crate_mae.comparison.options import CompareOptions
from crate_mae.data.documents import read_json, read_yaml, to_json
from crate_mae.data.files import damage_of, path_of, refuse_used_folder, write_digests, write_whole
from crate_mae.errors import DivergedError, UserError
from crate_mae.training.run_directory import Run, RunDirectory
from crate_mae.training.start import start

logger = logging.getLogger(__name__)

_PLAN_FILE = "comparison.yaml"  # a folder with this file is a comparison
_SCORES_FILE = "scores.json"
_HEADER = "# A comparison of crate-mae. The same command, given again, continues it.\n"
_SEARCH_SEED = 0
_RATE_FACTOR = 3.0  # between neighbouring learning rates, as long as the best is at the edge


@dataclass(frozen=True)
class Planned:
    """A network of an entry, with its measured costs and the plan that follows from them."""

    entry: Entry
    costs: Costs
    plan: BudgetPlan


@dataclass(frozen=True)
class ComparisonDirectory:
    """The files of a comparison."""

    path: Path

    def search_run(self, entry: str, rate: float) -> Path:
        """The run that tries a learning rate."""
        return self._runs_of(entry) / f"search-{rate:.3g}"

    def final_run(self, entry: str, seed: int) -> Path:
        """The final run of a seed."""
        return self._runs_of(entry) / f"seed-{seed}"

    def _runs_of(self, entry: str) -> Path:
        return self.path / "runs" / entry.replace("?", ",").replace("&", ",")  # Windows has no ? in names

    def existing(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """The content of `comparison.yaml`; None if the folder is free to use.

        Args:
            options: of the comparison that continues here.

        Raises:
            UserError: if the folder holds something else, or a comparison with other options.
        """
        file = path_of("--out", self.path / _PLAN_FILE)
        if not file.exists():
            refuse_used_folder(self.path, kind="a comparison", leftovers=(f".{_PLAN_FILE}.",))
            return None
        if damage := damage_of(self.path, [_PLAN_FILE]):
            raise UserError(
                f"The comparison in {self.path} is damaged: {damage}.\n"
                "Put a copy of that file back, or give a new folder with --out."
            )
        try:
            content = read_yaml(file)
            held = dict(content["options"])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a comparison. Give a new folder with --out.") from error
        keys = dict.fromkeys([*options, *held])
        changed = [f"{key}: {held.get(key)} -> {options.get(key)}" for key in keys if held.get(key) != options.get(key)]
        if changed:
            raise UserError(
                f"{self.path} holds a comparison with other options:\n  " + "\n  ".join(changed) + "\n"
                "To continue it, give the same options; for a new comparison, give another --out."
            )
        return content

    def save_plan(self, content: dict[str, Any]) -> None:
        """Write `comparison.yaml`."""
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        write_whole(self.path / _PLAN_FILE, _HEADER + text)
        self._write_digests()

    def _write_digests(self) -> None:
        write_digests(self.path, [name for name in (_PLAN_FILE, _SCORES_FILE) if (self.path / name).exists()])

    def score(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The scores under a key of `scores.json`; measured now if they are not there."""
        file = self.path / _SCORES_FILE
        try:
            damage = damage_of(self.path, [file.name]) if file.exists() else None
            if damage:
                logger.warning("%s: %s. All scores are measured again.", self.path, damage)
            scores = {} if damage else dict(read_json(file))
        except (ValueError, TypeError):  # not there yet, or damaged: measured again
            scores = {}
        if key not in scores:
            scores[key] = measure()
            write_whole(file, to_json(scores) + "\n")
            self._write_digests()
        return scores[key]


@dataclass(frozen=True)
class Moment:
    """A measurement during a run.

    Attributes:
        minutes: of training until then, without measurements and without steps lost to an interruption.
        images: seen until then.
        held_out_loss: loss on the images split off from the training data.
    """

    minutes: float
    images: int
    held_out_loss: float


@dataclass(frozen=True)
class Trial:
    """A run of the search.

    Attributes:
        planned: the network that was tried.
        rate: its learning rate, per 256 images.
        loss: on held-out training images; infinite if the run diverged.
        minutes: of training.
    """

    planned: Planned
    rate: float
    loss: float
    minutes: float


@dataclass(frozen=True, kw_only=True)
class Trained(Planned):
    """The network of an entry that the search chose, with the runs of the entry.

    Attributes:
        rate: learning rate of the final runs, per 256 images.
        trials: the search, of all networks of the entry; empty without one.
        runs: folders of the final runs by seed, without those that diverged.
        curves: their measurements.
    """

    rate: float
    trials: list[Trial]
    runs: dict[int, Path]
    curves: list[list[Moment]]

    @property
    def search_losses(self) -> dict[float, float]:
        """Held-out loss of the chosen network by learning rate."""
        return {trial.rate: trial.loss for trial in self.trials if trial.planned.entry == self.entry}

    @property
    def search_minutes(self) -> float:
        """Minutes of training in the search."""
        return sum(trial.minutes for trial in self.trials)

    @property
    def is_rate_at_edge(self) -> bool:
        """Whether a better learning rate may lie beyond those tried."""
        return len(self.search_losses) > 1 and self.rate in (min(self.search_losses), max(self.search_losses))


Report = Callable[[str], object]  # called with each line of progress


@dataclass(frozen=True)
class Trainer:
    """Trains entries one after another: two at a time would slow each other down.

    A finished run is used as it is, and an unfinished one is resumed, so training again costs nothing.

    Attributes:
        options: of the comparison.
        directory: of the comparison.
        report: called with each line of progress.
    """

    options: CompareOptions
    directory: ComparisonDirectory
    report: Report

    def train_all(self, planned: Sequence[Planned]) -> list[Trained]:
        """Search for every entry, then train all of them with the first seed, then with the next.

        A final run that diverges is left out.

        Raises:
            UserError: if an entry diverges at every learning rate tried or in every final run; or for a reason to stop
                a run.
            RunStopped: after SIGINT, SIGTERM or SIGHUP, when everything has been saved.
        """
        of_entries = [[each for each in planned if each.entry.named == named] for named in self.options.models]
        searches = [[trial for each in networks for trial in self.search(each)] for networks in of_entries]
        found = [_best(networks, trials) for networks, trials in zip(of_entries, searches, strict=True)]
        runs: list[dict[int, Run]] = [{} for _ in found]
        for seed in range(self.options.seeds):
            for (each, rate), of_entry in zip(found, runs, strict=True):
                out = self.directory.final_run(each.entry.name, seed)
                self._announce(f"{each.entry.name}: final run, seed {seed}", out, each.plan.final_steps, rate)
                try:
                    of_entry[seed] = self._run(each, out, lr=rate, steps=each.plan.final_steps, seed=seed)
                except DivergedError:
                    self.report(f"{each.entry.name}: seed {seed} diverged")
        for (each, _), of_entry in zip(found, runs, strict=True):
            if not of_entry:
                raise UserError(f"All final runs of {each.entry.name} diverged, so it cannot be compared.")
        return [
            Trained(
                **vars(each),
                rate=rate,
                trials=trials,
                runs={seed: run.path for seed, run in of_entry.items()},
                curves=[curve(run) for run in of_entry.values()],
            )
            for (each, rate), trials, of_entry in zip(found, searches, runs, strict=True)
        ]

    def search(self, planned: Planned) -> list[Trial]:
        """Try learning rates for a network, as many as its plan has."""
        name, plan = planned.entry.name, planned.plan
        trials: list[Trial] = []
        for _ in range(plan.tries):
            rate = next_rate({trial.rate: trial.loss for trial in trials}, plan.first_rate)
            if any(rate == trial.rate for trial in trials):  # the same to three digits
                break
            out = self.directory.search_run(name, rate)
            self._announce(f"{name}: search", out, plan.search_steps, rate)
            try:
                run = self._run(planned, out, lr=rate, steps=plan.search_steps, seed=_SEARCH_SEED)
            except DivergedError:
                self.report(f"{name}: diverged at learning rate {rate:.3g}")
                trials.append(Trial(planned, rate, loss=math.inf, minutes=0.0))
                continue
            end = curve(run)[-1]
            loss = end.held_out_loss if math.isfinite(end.held_out_loss) else math.inf
            trials.append(Trial(planned, rate, loss, end.minutes))
        return trials

    def _announce(self, what: str, out: Path, steps: int, rate: float) -> None:
        done = " (done before)" if RunDirectory(out).is_finished else ""
        self.report(f"{what}, {steps:,} steps at {rate:.3g}{done}")

    def _run(self, planned: Planned, out: Path, **settings: Any) -> Run:
        # The config has only the name of data from Python. What was filled in for the length of its run is open again.
        options = dataclasses.replace(
            planned.entry.config,
            **settings,
            **dict.fromkeys(("warmup_epochs", "monitor_steps", "log_steps", "checkpoint_epochs", "origins")),
            data=self.options.train,
            out=out,
            precision=planned.costs.precision,
        )
        return start(options, on_progress=lambda line: self.report(f"    {line}"))


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


def _best(networks: Sequence[Planned], trials: Sequence[Trial]) -> tuple[Planned, float]:
    """The network and the learning rate of the final runs."""
    if not trials:
        (network,) = networks
        return network, network.plan.first_rate
    best = min(trials, key=lambda trial: trial.loss)
    if math.isinf(best.loss):
        tried = ", ".join(f"{trial.rate:.3g}" for trial in trials)
        raise UserError(
            f"{networks[0].entry.named} diverged at every learning rate tried ({tried}), so it cannot be compared."
        )
    return best.planned, best.rate
