"""The table of a comparison, as Markdown and as CSV, and notes on how to read it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from crate_mae.comparison.entries import Images
from crate_mae.comparison.options import Budget, CompareOptions, alternatives, parse_budget
from crate_mae.comparison.results import (
    SCORES,
    EntryResult,
    Scores,
    SeedSpread,
    difference,
    score_compared,
    spread,
)
from crate_mae.data.documents import read_json, to_csv
from crate_mae.drawing.measures import MEASURES
from crate_mae.models.config import MASK_RATIO

RULE = (
    "Two entries differ in a score if 0 is outside the 95% interval of their difference over seeds, paired, widened by "
    "the error of the validation images; every other difference may be chance."
)
_NORMAL_QUANTILE = 1.96  # two-sided, 95%
_MUCH_LONGER = 1.15  # than the budget in minutes
_LEAST_DIFFERENCE = 0.02  # of a cost, relative, to be mentioned


def table_rows(results: Sequence[EntryResult], pixels: dict[str, float]) -> list[list[str]]:
    """The table as text: a heading, then a line per quantity with a cell per entry, and raw pixels."""
    # Targets were normalised: a note below the table explains this.
    mark = ", own statistics" if results[0].entry.config.norm_pix_loss else ""

    def line(title: str, cell: Callable[[EntryResult], str], pixels_cell: str = "") -> list[str]:
        return [title, *(cell(result) for result in results), *([pixels_cell] if pixels else [])]

    rows = [
        line("", lambda r: r.name, "raw pixels"),
        line("parameters, encoder", lambda r: _millions(r.costs.encoder_parameters)),
        line("parameters, all", lambda r: _millions(r.costs.parameters)),
        line("forward FLOPs an image, encoder, nothing hidden", lambda r: _scaled(r.costs.encoder_flops)),
        line("training FLOPs an image", lambda r: _scaled(r.costs.training_flops)),
        line("images/s in training, timed in turns", lambda r: f"{r.images_per_second:,.0f}"),
        line("peak memory of a training step", lambda r: _memory(r.costs.memory)),
        line("precision", lambda r: r.costs.precision),
        line("steps, search + final run", _steps),
        line("images seen in the final run", lambda r: f"{r.plan.final_steps * r.batch_size:,}"),
        line("minutes used, search + final run", _minutes),
        line("training FLOPs used, both", lambda r: _scaled(r.training_flops)),
        line("learning rate chosen, per 256 images", lambda r: f"{r.rate:.3g}"),
    ]
    for name in SCORES:
        title = MEASURES[name].title + ("" if MEASURES[name].unit == "share" else mark)
        if any(spread(result.scores.values(), name) for result in results):
            of_pixels = score_text(name, spread([pixels], name)) if pixels else ""
            rows.append(line(title, lambda r, name=name: score_text(name, spread(r.scores.values(), name)), of_pixels))
        if any(spread(result.random.values(), name) for result in results):
            title = f"{title}, random initialisation"
            rows.append(line(title, lambda r, name=name: score_text(name, spread(r.random.values(), name))))
    return rows


def verdict(results: Sequence[EntryResult], pixels: dict[str, float]) -> str:
    """The linear probes, or without labels the completions, in one sentence that begins with the controls."""
    name = score_compared(results)
    controls = [("raw pixels", spread([pixels], name))] if pixels else []
    controls += [(f"{each.name} with random initialisation", spread(each.random.values(), name)) for each in results]
    known = [f"{label} {score_text(name, score, with_range=False)}" for label, score in controls if score]
    own = [(result.name, spread(result.scores.values(), name)) for result in results]
    found = [f"{label} {score_text(name, score, with_range=False)}" for label, score in own]
    title, _ = SCORES[name]
    return f"{title[0].upper()}{title[1:]}: {', '.join([*known, *found])}."


def markdown(rows: Sequence[Sequence[str]], notes: Sequence[str], title: str, first: str) -> str:
    """The verdict, the table and the notes below it, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    lines = [
        f"# {title}",
        "",
        f"**{first}**",
        "",
        line(rows[0]),
        rule,
        *map(line, rows[1:]),
        "",
        "## How to read it",
        "",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def csv_text(results: Sequence[EntryResult], pixels: dict[str, float]) -> str:
    """CSV with a line per entry, per random initialisation, and for raw pixels; scores are shares."""
    rows = []
    for result in results:
        rows.append(
            {"model": result.name, "weights": "trained", **result.numbers(), **_score_cells(result.scores.values())}
        )
        if cells := _score_cells(result.random.values()):
            keys = ("parameters_encoder", "parameters", "encoder_flops_per_image")
            numbers = {key: value for key, value in result.numbers().items() if key in keys}
            rows.append({"model": result.name, "weights": "random", **numbers, **cells})
    if pixels:
        rows.append({"model": "pixels", "weights": "none", **_score_cells([pixels])})
    return _csv(rows)


def seeds_text(results: Sequence[EntryResult]) -> str:
    """CSV with a line per entry, weights and seed; scores are shares."""
    return _csv(
        [
            {"model": result.name, "weights": weights, "seed": seed, **{name: of_seed.get(name) for name in SCORES}}
            for result in results
            for weights, scores in (("trained", result.scores), ("random", result.random))
            for seed, of_seed in scores.items()
            if of_seed
        ]
    )


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the columns of the first."""
    return to_csv(list(rows[0]), ([row.get(column) for column in rows[0]] for row in rows))


def score_text(name: str, score: SeedSpread | None, *, with_range: bool = True) -> str:
    """A score as text: the mean, and over several seeds the sample standard deviation and the range."""
    if score is None:
        return "-"
    mean, low, high = (_digits(name, value) for value in (score.mean, score.low, score.high))
    if score.std is None:
        return mean + MEASURES[name].suffix
    text = f"{mean} ± {_digits(name, score.std)}{MEASURES[name].suffix}"
    return f"{text} ({low} to {high})" if with_range else text


def _digits(name: str, value: float, sign: str = "") -> str:
    """A value of a score as text, without its unit."""
    return f"{MEASURES[name].scale * value:{sign}.{SCORES[name][1]}f}"


def _score_cells(scores: Iterable[dict[str, float]]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name in SCORES:
        if found := spread(scores, name):
            cells |= {f"{name}_{key}": getattr(found, key) for key in ("mean", "std", "low", "high")}
    return cells


def _steps(result: EntryResult) -> str:
    tries = Counter(trial.planned.plan.search_steps for trial in result.trials)
    search = "".join(f"{number} x {steps:,} + " for steps, number in tries.items())
    return f"{search}{result.plan.final_steps:,}"


def _minutes(result: EntryResult) -> str:
    search = f"{result.search_minutes:.2f} + " if result.trials else ""
    return f"{search}{result.final_minutes:.2f}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _scaled(flops: float) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.2f} {prefix}"
    return f"{flops:,.0f}"


def _memory(number: int | None) -> str:
    if number is None:
        return "not measured"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def write_notes(results: Sequence[EntryResult], options: CompareOptions, images: Images) -> list[str]:
    """Notes on how to read the table, the most important first: where the first entry is behind."""
    budget = parse_budget(options.budget)
    return [
        *_standing(results, images),
        *_certainty(options, images),
        *_terms(results, options, budget),
        *_warnings(results, budget, images),
    ]


def _standing(results: Sequence[EntryResult], images: Images) -> Iterator[str]:
    """Where the first entry is behind each of the others, and where it is ahead."""
    first, *others = results
    for other in others:
        behind, ahead = [], []
        for name, (title, _) in SCORES.items():
            mine, theirs = spread(first.scores.values(), name), spread(other.scores.values(), name)
            found = difference(first.scores, other.scores, name)
            if mine is None or theirs is None or found is None or found[0] == 0:
                continue
            is_better = (found[0] > 0) == (MEASURES[name].better == "higher")
            text = " against ".join(score_text(name, score, with_range=False) for score in (mine, theirs))
            chance = ", may be chance" if may_be_chance(name, first.scores, other.scores, len(images.val)) else ""
            text = f"{title} ({text}{_interval(name, *found)}{chance})"
            (ahead if is_better else behind).append(text)
        costs = {
            "parameters": (first.costs.parameters, other.costs.parameters, False),
            "training FLOPs an image": (first.costs.training_flops, other.costs.training_flops, False),
            "images/s in training": (first.images_per_second, other.images_per_second, True),
            "memory": (first.costs.memory or 0, other.costs.memory or 0, False),
        }
        for title, (mine, theirs, more_is_better) in costs.items():
            if mine and theirs and abs(mine / theirs - 1) > _LEAST_DIFFERENCE:
                text = f"{title} ({mine / theirs:.2f} times as {'many' if title != 'memory' else 'much'})"
                (ahead if (mine > theirs) == more_is_better else behind).append(text)
        yield f"{first.name} is behind {other.name} in: {', '.join(behind) or 'nothing that was measured'}."
        yield f"{first.name} is ahead of {other.name} in: {', '.join(ahead) or 'nothing that was measured'}."


def may_be_chance(name: str, mine: Scores, theirs: Scores, val_images: int) -> bool:
    """Whether another choice of images or seeds could give the same difference by chance.

    The bound is the half width of the paired interval over seeds (`results.difference`: 4.3 standard errors for three
    seeds, 2.8 for five) and 1.96 standard errors of the images, added in squares; with one seed, the latter alone.

    The result of each image is not kept, so the errors of the probes are treated as independent, although they are for
    the same images. Two models mostly fail on the same images, so the true standard error is smaller: the bound is
    cautious, and a marked difference might still pass a paired test such as McNemar's. One seed says nothing about the
    spread over seeds, which a note of `_certainty` states.
    """
    found = difference(mine, theirs, name)
    assert found is not None, "both have the score"
    mean, half = found
    squared = (half or 0.0) ** 2
    if MEASURES[name].unit == "share":
        shares = [spread(scores.values(), name) for scores in (mine, theirs)]
        squared += sum(_NORMAL_QUANTILE**2 * s.mean * (1 - s.mean) / val_images for s in shares if s is not None)
    return abs(mean) < math.sqrt(squared)


def _interval(name: str, difference: float, half: float | None) -> str:
    """A difference over several seeds, in the unit of the score."""
    if half is None:
        return ""
    unit = " points" if MEASURES[name].unit == "share" else MEASURES[name].suffix
    mean, low, high = (_digits(name, value, "+") for value in (difference, difference - half, difference + half))
    return f": {mean}{unit}, {low} to {high}"


def _certainty(options: CompareOptions, images: Images) -> Iterator[str]:
    """How certain differences are, and what the words "may be chance" mean."""
    if options.seeds > 1:
        yield (
            f"Scores are means over {options.seeds} seeds ± the sample standard deviation, and the range. Each seed "
            "had a final run of the same length; the search was done once, with the first. Two runs of a seed see the "
            f"images in the same order. {RULE}"
        )
    else:
        yield (
            "One run each: there is no spread, so the effect of another seed is unknown. One seed cannot tell models "
            "apart by less than the spread of seeds, whatever the number of images: every difference above is one "
            "between two runs, not between two models. Try --seeds 3."
        )
    if images.classes:
        yield (
            "A difference between probes may be chance if it is within 95% of what other images"
            f"{' or other seeds' if options.seeds > 1 else ', not other seeds,'} would give, computed as if each model "
            "had been measured on images of its own. All were measured on the same images, so this bound is cautious."
        )


def _terms(results: Sequence[EntryResult], options: CompareOptions, budget: Budget) -> Iterator[str]:
    """What was equal for all entries."""
    c = results[0].entry.config
    networks = len(alternatives(options.models[0]))
    tried = [f"{networks} networks"] if networks > 1 else []
    tried += [f"{options.lr_search} learning rates{' for each' if tried else ''}"] if options.lr_search > 1 else []
    search = (
        f": {options.search_share:.0%} for a search over {' and '.join(tried)} (chosen by "
        "the loss on held-out training images, never by the validation images)"
        if tried
        else " (no search for a learning rate)"
    )
    yield (
        f"Each entry had {budget}{search}. The final run had the rest, with its own full schedule; all had "
        f"batches of {c.batch_size}, the same images in the same order, {c.mask_ratio:.0%} hidden, crops of at least "
        f"{c.min_crop:.0%}, {'flips' if c.flip else 'no flips'}."
    )
    places = {result.name: result.entry.config.mask_tokens for result in results}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} at the {place}" for name, place in places.items())
        yield (
            f"Mask tokens are inserted where each model's design has them: {listed}. An encoder without them processes "
            "only visible patches, which saves FLOPs in training."
        )
    yield (
        "FLOPs are those of matrix products and convolutions, with a multiplication and addition counted as 2. Norms, "
        "softmax and the optimizer are not counted."
    )
    yield (
        "Images/s are those of a training step with its images in memory, the median of steps taken in turns. Minutes "
        "are those of the actual training, without the measurements in between. Memory is that of a training step in a "
        "separate process, without the memory of its imports."
    )
    yield f"Completions: {MASK_RATIO:.0%} of the patches hidden, the same images and masks for all."


def _warnings(results: Sequence[EntryResult], budget: Budget, images: Images) -> Iterator[str]:
    """What limits the meaning of the numbers."""
    if images.why_no_probes:
        yield f"No probes: {images.why_no_probes}"
    else:
        yield (
            f"Probes: frozen features, {len(images.train):,} training and {len(images.val):,} validation images of "
            f"{images.classes} classes. Random initialisation means the weights before the first step; a model that "
            "does not beat them, or raw pixels, has learned nothing that helps with these labels."
        )
    if results[0].entry.config.norm_pix_loss:
        yield (
            "Trained with --norm-pix-loss: brightness and contrast of each completed patch come from the original, so "
            "completions look better here than without it."
        )
    if len(differing := _environments(results)) > 1:
        yield (
            f"The final runs were not all made in the same environment ({'; '.join(differing)}), so their minutes "
            "cannot be compared, and scores may differ for that reason."
        )
    for result in results:
        if failed := [str(seed) for seed in result.random if seed not in result.scores]:
            yield f"{result.name} diverged with seed {', '.join(failed)}, which its scores leave out."
        if len(of_networks := _best_of_each(result)) > 1:
            listed = ", ".join(f"{name} {loss:.4f}" for name, loss in of_networks.items())
            yield (
                f"{result.name} was chosen by its held-out loss in the search: {listed}. With a whole budget, another "
                "one might be better: short runs favour networks that learn fast."
            )
        losses = result.search_losses
        if result.is_rate_at_edge:
            tried = ", ".join(f"{rate:.3g}" for rate in losses)
            yield (
                f"{result.name}: the best learning rate, {result.rate:.3g}, lies at the edge of those "
                f"tried ({tried}). A better one may lie beyond: try more with --lr-search."
            )
        if diverged := [f"{rate:.3g}" for rate, loss in losses.items() if math.isinf(loss)]:
            yield f"{result.name} diverged at learning rate {', '.join(diverged)}; those minutes are not counted."
        if budget.kind == "minutes" and not 1 / _MUCH_LONGER < result.minutes / budget.amount < _MUCH_LONGER:
            yield (
                f"{result.name} took {result.minutes:.2f} minutes, not {budget.amount:g}: its number "
                "of steps was set before the start, from the time of a step then, and the machine was slower or faster "
                "later."
            )


def _best_of_each(result: EntryResult) -> dict[str, float]:
    """The lowest held-out loss of each network that was tried."""
    best: dict[str, float] = {}
    for trial in result.trials:
        name = trial.planned.entry.name
        best[name] = min(trial.loss, best.get(name, math.inf))
    return best


def _environments(results: Sequence[EntryResult]) -> list[str]:
    """Descriptions of the machines and versions of the final runs, without repetition."""
    found: dict[str, None] = {}
    for result in results:
        for run in result.runs.values():
            made = read_json(run / "environment.json")
            hardware = ", ".join([made["processor"], f"{made['threads']} threads", *made["gpus"]])
            found[f"PyTorch {made['packages']['torch']}, Python {made['python']}, {hardware}"] = None
    return list(found)
