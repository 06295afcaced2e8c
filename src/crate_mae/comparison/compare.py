"""A comparison from its options to its figures, from top to bottom: check, measure, plan, train, score, publish."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_mae.comparison.entries import (
    BudgetPlan,
    Costs,
    Entry,
    Images,
    measure_costs,
    open_images,
    plan_budget,
    resolve_entries,
)
from crate_mae.comparison.figure import draw_curves, draw_scores
from crate_mae.comparison.options import CompareOptions, parse_budget
from crate_mae.comparison.report import RULE, csv_text, markdown, seeds_text, table_rows, verdict, write_notes
from crate_mae.comparison.results import EntryResult, measure_all
from crate_mae.comparison.runs import ComparisonDirectory, Planned, Report, Trainer
from crate_mae.data.files import output_path, write_whole
from crate_mae.drawing.text import duration
from crate_mae.errors import UserError
from crate_mae.training.processes import computing_threads, training_device
from crate_mae.training.run_directory import environment


@dataclass(frozen=True)
class Comparison:
    """The return value of `crate_mae.compare`.

    Attributes:
        path: the folder.
        table: the table as text: a heading, then a line per quantity with a cell per entry.
        notes: how to read it.
        results: everything in numbers, one per entry; empty after a dry run, like the two above.
        plan: the content of comparison.yaml, which a dry run does not write.
    """

    path: Path
    table: list[list[str]]
    notes: list[str]
    results: list[EntryResult]
    plan: dict[str, Any]


def compare(options: CompareOptions, *, report: Report) -> Comparison:
    """Start a comparison, or continue the one in its folder; see `crate_mae.compare`.

    Args:
        options: of the comparison.
        report: called with each line of progress.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A comparison runs in one process, so that its times are those of one machine: start it without a launcher."
        )
    images = open_images(options)
    out = output_path("--out", options.out)
    saved = options.saved(images.train_name, images.val_name)
    directory = ComparisonDirectory(out)
    existing = directory.existing(saved)
    entries = resolve_entries(options, images)
    with computing_threads(entries[0].config.threads):
        if existing is None:
            report("Timing a training step of every entry, in turns.")
            planned = _plan(options, entries, measure_costs(entries, images.train, training_device()))
        else:
            planned = _read_plan(existing, entries, out)
        for line in _plan_lines(options, planned):
            report(line)
        if images.why_no_probes:
            report(f"No probes: {images.why_no_probes}")
        plan = existing or _plan_content(saved, planned)
        if options.dry_run:
            report("This was a dry run: nothing has been written.")
            return Comparison(out, [], [], [], plan)
        if existing is None:
            directory.save_plan(plan)
        trained = Trainer(options, directory, report).train_all(planned)
        results, pixels = measure_all(options, trained, images=images, directory=directory, report=report)
    return publish(out, results, pixels, options=options, images=images, plan=plan)


def publish(
    out: Path,
    results: list[EntryResult],
    pixels: dict[str, float],
    *,
    options: CompareOptions,
    images: Images,
    plan: dict[str, Any],
) -> Comparison:
    """Write the tables and the figures."""
    rows = table_rows(results, pixels)
    notes = write_notes(results, options, images)
    title = f"{', '.join(options.models)}: {options.budget} each, on {images.train.name}"
    write_whole(out / "table.csv", csv_text(results, pixels))
    write_whole(out / "seeds.csv", seeds_text(results))
    write_whole(out / "table.md", markdown(rows, notes, title, verdict(results, pixels)))
    draw_scores(results, pixels, out / "figure.png")
    draw_curves(results, out / "curves.png")
    return Comparison(out, rows, notes, results, plan)


def _plan(options: CompareOptions, entries: Sequence[Entry], costs: Sequence[Costs]) -> list[Planned]:
    budget, networks = parse_budget(options.budget), Counter(entry.named for entry in entries)

    def plan(entry: Entry, cost: Costs) -> BudgetPlan:
        tries, share = options.lr_search, options.search_share
        return plan_budget(budget, entry, cost, tries=tries, share=share, networks=networks[entry.named])

    return [Planned(entry, cost, plan(entry, cost)) for entry, cost in zip(entries, costs, strict=True)]


def _plan_content(options: dict[str, Any], planned: Sequence[Planned]) -> dict[str, Any]:
    """The content of `comparison.yaml`."""
    plans = {}
    for each in planned:
        entry, c = each.entry, each.entry.config
        plans[entry.name] = {
            "costs": dataclasses.asdict(each.costs),
            "plan": dataclasses.asdict(each.plan),
            "batch_size": c.batch_size,
            "workers": c.workers,
            "threads": c.threads,
            "model": {key: list(v) if isinstance(v, tuple) else v for key, v in entry.model.to_dict().items()},
        }
    return {"options": options, "entries": plans, "rule": RULE, "environment": environment()}


def _read_plan(content: dict[str, Any], entries: Sequence[Entry], out: Path) -> list[Planned]:
    """The costs and plans from when the comparison began, which are kept even if the machine is faster now."""
    planned = []
    try:
        plans = content["entries"] if "entries" in content else content["contestants"]  # of the first version
        for entry in entries:
            saved = plans[entry.name]
            planned.append(Planned(entry, Costs(**saved["costs"]), BudgetPlan(**saved["plan"])))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{out}/comparison.yaml has no complete plan of this version of crate-mae. Give a new folder with --out."
        ) from error
    return planned


def _plan_lines(options: CompareOptions, planned: Sequence[Planned]) -> Iterator[str]:
    searches, finals = 0.0, dict.fromkeys(options.models, 0.0)
    for each in planned:
        entry, costs, plan = each.entry, each.costs, each.plan
        seconds = costs.seconds_per_step(entry.config.workers)
        searches += seconds * plan.tries * plan.search_steps
        # Of several networks, the slowest: which one is chosen is not known yet.
        finals[entry.named] = max(finals[entry.named], seconds * options.seeds * plan.final_steps)
        search = f"search {plan.tries} x {plan.search_steps:,} steps, " if plan.tries else ""
        seeds = f" for each of {options.seeds} seeds" if options.seeds > 1 else ""
        yield (
            f"{entry.name}: {costs.parameters / 1e6:.2f} M parameters, {1000 * seconds:.3g} ms a step of "
            f"{entry.config.batch_size} in {costs.precision}; {search}final run {plan.final_steps:,} steps{seeds}; "
            f"lr {plan.first_rate:.3g}{' at first' if plan.tries else ''}"
        )
    if options.seeds > 1:
        yield RULE
    total = duration(searches + sum(finals.values()))
    yield f"Training takes about {total} in all, one run after another; measuring comes on top."
