"""A comparison from its options to its pictures, from top to bottom: check, measure, plan, train, score, publish."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_mae.comparison.contestants import Contestant, Images, open_images, resolve_contestants
from crate_mae.comparison.costs import Costs, measure_costs
from crate_mae.comparison.course import Course, plan_course
from crate_mae.comparison.directory import ComparisonDirectory
from crate_mae.comparison.figure import draw_curves, draw_scores
from crate_mae.comparison.notes import describe
from crate_mae.comparison.options import Options, parse_budget
from crate_mae.comparison.outcome import Outcome
from crate_mae.comparison.runs import Say, Trainer
from crate_mae.comparison.scores import measure_all
from crate_mae.comparison.table import csv_text, markdown, table_rows
from crate_mae.data.files import write_whole
from crate_mae.errors import UserError
from crate_mae.training.processes import computing_threads, training_device
from crate_mae.training.progress import duration
from crate_mae.training.run_directory import environment


@dataclass(frozen=True)
class Comparison:
    """What `crate_mae.compare` returns.

    Attributes:
        path: the folder.
        table: the table as text: a heading, then a line for each quantity with a cell for each contestant.
        notes: how to read it.
        outcomes: everything in numbers, one for each contestant; empty after a dry run, like the two above.
    """

    path: Path
    table: list[list[str]]
    notes: list[str]
    outcomes: list[Outcome]


def compare(options: Options, out: Path, *, dry_run: bool, say: Say) -> Comparison:
    """Start a comparison, or go on with the one that is in `out`; see `crate_mae.compare`.

    Args:
        options: of the comparison.
        out: its folder.
        dry_run: stop after telling the plan.
        say: is told what happens, line by line.
    """
    _refuse_launcher()
    images = open_images(options)
    plain = options.plain(images.train_name, images.val_name)
    directory = ComparisonDirectory(out)
    existing = directory.existing(plain)
    contestants = resolve_contestants(options, images)
    with computing_threads(contestants[0].config.threads):
        if existing is None:
            say("Timing a training step of every contestant, in turns.")
            costs = measure_costs(contestants, images.train, training_device())
            courses = _plan(options, contestants, costs)
        else:
            costs, courses = _read_plan(existing, contestants, out)
        for line in _plan_lines(options, contestants, costs, courses):
            say(line)
        if images.why_no_probes:
            say(f"No probes: {images.why_no_probes}")
        if dry_run:
            say("This was a dry run: nothing has been written.")
            return Comparison(out, [], [], [])
        if existing is None:
            directory.save_plan(_plan_content(plain, contestants, costs, courses))
        trained = Trainer(options, directory, say).train_all(contestants, costs, courses)
        scores = measure_all(options, contestants, trained, images=images, directory=directory, say=say)
    parts = zip(contestants, costs, courses, trained, scores.trained, scores.random, strict=True)
    fields = [field.name for field in dataclasses.fields(Outcome)]
    outcomes = [Outcome(**dict(zip(fields, part, strict=True))) for part in parts]
    return publish(out, outcomes, scores.pixels, options=options, images=images)


def publish(
    out: Path, outcomes: list[Outcome], pixels: dict[str, float], *, options: Options, images: Images
) -> Comparison:
    """Write the tables and the pictures."""
    rows = table_rows(outcomes, pixels)
    notes = describe(outcomes, options, parse_budget(options.budget), images)
    title = f"{', '.join(options.models)}: {options.budget} each, on {images.train.name}"
    write_whole(out / "table.csv", csv_text(outcomes, pixels).encode())
    write_whole(out / "table.md", markdown(rows, notes, title).encode())
    draw_scores(outcomes, pixels, out / "figure.png")
    draw_curves(outcomes, out / "curves.png")
    return Comparison(out, rows, notes, outcomes)


def _plan(options: Options, contestants: Sequence[Contestant], costs: Sequence[Costs]) -> list[Course]:
    budget = parse_budget(options.budget)
    return [
        plan_course(
            budget,
            cost,
            name=contestant.name,
            batch_size=contestant.config.batch_size,
            workers=contestant.config.workers,
            first_rate=contestant.config.lr,
            tries=options.lr_search,
            share=options.search_share,
        )
        for contestant, cost in zip(contestants, costs, strict=True)
    ]


def _plan_content(
    plain: dict[str, Any], contestants: Sequence[Contestant], costs: Sequence[Costs], courses: Sequence[Course]
) -> dict[str, Any]:
    """What `comparison.yaml` holds."""
    planned = {}
    for contestant, cost, course in zip(contestants, costs, courses, strict=True):
        model = {key: list(v) if isinstance(v, tuple) else v for key, v in contestant.model.to_dict().items()}
        c = contestant.config
        settled = {"batch_size": c.batch_size, "workers": c.workers, "threads": c.threads}
        planned[contestant.name] = {
            "costs": dataclasses.asdict(cost),
            "plan": dataclasses.asdict(course),
            **settled,
            "model": model,
        }
    return {"options": plain, "contestants": planned, "environment": environment()}


def _read_plan(
    content: dict[str, Any], contestants: Sequence[Contestant], out: Path
) -> tuple[list[Costs], list[Course]]:
    """What was measured and planned when the comparison began: it is kept, however fast the machine is now."""
    try:
        planned = [content["contestants"][contestant.name] for contestant in contestants]
        costs = [Costs(**of_one["costs"]) for of_one in planned]
        courses = [Course(**of_one["plan"]) for of_one in planned]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{out}/comparison.yaml has no whole plan of this version of crate-mae. Give a new folder with --out."
        ) from error
    return costs, courses


def _plan_lines(
    options: Options, contestants: Sequence[Contestant], costs: Sequence[Costs], courses: Sequence[Course]
) -> Iterator[str]:
    total = 0.0
    for contestant, cost, course in zip(contestants, costs, courses, strict=True):
        c = contestant.config
        seconds = cost.seconds_per_step(c.workers)
        total += seconds * (course.tries * course.search_steps + options.seeds * course.final_steps)
        search = f"search {course.tries} x {course.search_steps:,} steps, " if course.tries else ""
        seeds = f" for each of {options.seeds} seeds" if options.seeds > 1 else ""
        yield (
            f"{contestant.name}: {cost.parameters / 1e6:.2f} M parameters, {1000 * seconds:.3g} ms a step of "
            f"{c.batch_size} in {cost.precision}; {search}final run {course.final_steps:,} steps{seeds}; "
            f"lr {course.first_rate:.3g}{' at first' if course.tries else ''}"
        )
    yield f"Training takes about {duration(total)} in all, one run after another; measuring comes on top."


def _refuse_launcher() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A comparison runs in one process, so that its times are those of one machine: start it without a launcher."
        )
