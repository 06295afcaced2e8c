"""The results of a comparison: the scores of each entry and of the controls, and the numbers for its table."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crate_mae.comparison.entries import Images, extraction
from crate_mae.comparison.options import CompareOptions
from crate_mae.comparison.runs import ComparisonDirectory, Report, Trained
from crate_mae.evaluation.backbones import PIXELS_SIDE
from crate_mae.evaluation.extract import Extraction, Features
from crate_mae.evaluation.probes import half_width, knn_probe, linear_probe
from crate_mae.evaluation.probing import probe
from crate_mae.evaluation.reconstruction import completion_scores, read_sample
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import MASK_RATIO
from crate_mae.models.features import transform_of
from crate_mae.models.weights import load_autoencoder

SCORES = {  # keys of `MEASURES`, with their names in a sentence and their digits after the point
    "linear": ("the linear probe", 2),
    "knn": ("k-NN", 2),
    "psnr": ("the PSNR of completions", 2),
    "ssim": ("the SSIM of completions", 3),
    "mse": ("the squared error of completions", 4),
}
_MOST_COMPLETED = 1000


@dataclass(frozen=True)
class SeedSpread:
    """One score over seeds.

    Attributes:
        mean: over seeds.
        std: sample standard deviation; None for one seed.
        low: the smallest.
        high: the largest.
    """

    mean: float
    std: float | None
    low: float
    high: float


Scores = Mapping[int, dict[str, float]]  # by seed


def spread(scores: Iterable[dict[str, float]], name: str, scale: float = 1.0) -> SeedSpread | None:
    """One score over seeds, times a scale; None if it was not measured."""
    values = [scale * of_seed[name] for of_seed in scores if name in of_seed]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return SeedSpread(statistics.fmean(values), std, min(values), max(values))


def difference(mine: Scores, theirs: Scores, name: str) -> tuple[float, float | None] | None:
    """By how much one entry scores more than another, seed by seed; None if there is no seed with which both score.

    Runs of a seed have the images in the same order and the same masks, and their difference is without that noise.

    Returns:
        the mean over seeds, and the half width of its 95% interval, Student's t, paired; None for one seed.
    """
    seeds = [seed for seed in mine if name in mine[seed] and name in theirs.get(seed, {})]
    values = [mine[seed][name] - theirs[seed][name] for seed in seeds]
    if not values:
        return None
    return statistics.fmean(values), half_width(values) if len(values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class EntryResult(Trained):
    """One entry, from its costs to its scores.

    Attributes:
        scores: of each seed's final run.
        random: of the same networks at their random initialisation; empty dictionaries without labels.
    """

    scores: Scores
    random: Scores

    @property
    def name(self) -> str:
        """Name of the preset, with the entry's settings."""
        return self.entry.name

    @property
    def batch_size(self) -> int:
        """Images per step."""
        return self.entry.config.batch_size

    @property
    def search_steps(self) -> int:
        """Steps of the search, over all trials."""
        return sum(trial.planned.plan.search_steps for trial in self.trials)

    @property
    def final_minutes(self) -> float:
        """Minutes of training in the final run, the mean over seeds."""
        return statistics.fmean(curve[-1].minutes for curve in self.curves)

    @property
    def minutes(self) -> float:
        """Minutes of training in the search and one final run."""
        return self.search_minutes + self.final_minutes

    @property
    def training_flops(self) -> float:
        """Training FLOPs of the search and one final run."""
        runs = [(trial.planned.costs, trial.planned.plan.search_steps) for trial in self.trials]
        runs.append((self.costs, self.plan.final_steps))
        return self.batch_size * sum(costs.training_flops * steps for costs, steps in runs)

    @property
    def images_per_second(self) -> float:
        """Training speed with images in memory."""
        return self.batch_size / self.costs.step_seconds

    def numbers(self) -> dict[str, float | int | None]:
        """Numbers that do not depend on the seed, by their column in `table.csv`."""
        return {
            "parameters_encoder": self.costs.encoder_parameters,
            "parameters": self.costs.parameters,
            "encoder_flops_per_image": self.costs.encoder_flops,
            "training_flops_per_image": self.costs.training_flops,
            "images_per_second": self.images_per_second,
            "peak_memory_bytes": self.costs.memory,
            "steps_search": self.search_steps,
            "steps": self.plan.final_steps,
            "images_seen": self.plan.final_steps * self.batch_size,
            "minutes_search": self.search_minutes,
            "minutes": self.final_minutes,
            "training_flops": self.training_flops,
            "lr": self.rate,
        }


def score_compared(results: Sequence[EntryResult]) -> str:
    """The score that models are compared by first: the linear probe, or without labels the PSNR of completions."""
    return "linear" if all(spread(result.scores.values(), "linear") for result in results) else "psnr"


def measure_all(
    options: CompareOptions,
    trained: Sequence[Trained],
    *,
    images: Images,
    directory: ComparisonDirectory,
    report: Report,
) -> tuple[list[EntryResult], dict[str, float]]:
    """Measure everything that has not been measured yet: the results of the entries, and the scores of raw pixels."""

    def probed(model: Any) -> dict[str, float]:
        return _probe(model, options, images) if images.classes else {}

    def completed_and_probed(run: Any) -> dict[str, float]:
        model = load_autoencoder(run)
        return {**_complete(model, images), **probed(model)}

    def score(key: str, measure: Any, subject: Any) -> dict[str, float]:
        report(f"measuring {key}")
        return directory.score(key, lambda: measure(subject))

    entries = [each.entry for each in trained]
    names = [entry.name for entry in entries]
    scores = [
        {seed: score(f"{name}/seed-{seed}", completed_and_probed, run) for seed, run in of_entry.runs.items()}
        for name, of_entry in zip(names, trained, strict=True)
    ]
    random = [
        {seed: score(f"{entry.name}/random-{seed}", probed, entry.build(seed)) for seed in range(options.seeds)}
        for entry in entries
    ]
    # With larger images, a linear classifier of the pixels would take longer than the training.
    pixels = score("pixels", probed, f"pixels:{min(PIXELS_SIDE, *entries[0].model.image_size)}")
    results = [
        EntryResult(**vars(of_entry), scores=own, random=control)
        for of_entry, own, control in zip(trained, scores, random, strict=True)
    ]
    return results, pixels


def _complete(model: MaskedAutoencoder, images: Images) -> dict[str, float]:
    """Scores of completions: the same images and masks for every model."""
    read = read_sample(images.val, transform_of(model.config), _MOST_COMPLETED)
    (score,) = completion_scores(model, read.images, [MASK_RATIO])
    return {"psnr": score.psnr, "ssim": score.ssim, "mse": score.mse}


def _probe(model: Any, options: CompareOptions, images: Images) -> dict[str, float]:
    found: dict[str, float] = {}

    def run(train: Features, val: Features, _classes: list[str]) -> list[None]:
        assert train.labels is not None and val.labels is not None, "probes are only run with labels"
        data = (train.values, train.labels, val.values, val.labels)
        found["knn"] = knn_probe(*data).top1.value
        found["linear"] = linear_probe(*data).top1.value
        return [None]

    # Raw pixels have one layer and one pooling, whatever the options are for the encoders.
    wanted = extraction(options) if not isinstance(model, str) else Extraction(workers=options.workers)
    probe(model, images.train, images.val, run, extraction=wanted)
    return found
