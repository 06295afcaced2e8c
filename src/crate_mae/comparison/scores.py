"""What the contestants have learned, and what the controls know without any learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crate_mae.comparison.contestants import NEIGHBOURS, Contestant, Images, extraction
from crate_mae.comparison.directory import ComparisonDirectory
from crate_mae.comparison.options import Options
from crate_mae.comparison.runs import Say, Trained
from crate_mae.data import evaluation_transform
from crate_mae.data.facts import fixed_sample
from crate_mae.evaluation.extract import Extraction, Features
from crate_mae.evaluation.probes import knn_probe, linear_probe
from crate_mae.evaluation.probing import probe
from crate_mae.evaluation.reconstruction import completion_scores, read_images
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.weights import load_autoencoder

MASK_RATIO = 0.75
_MOST_COMPLETED = 1000
_PIXELS_SIDE = 32  # of larger images, a linear classifier of the pixels would take longer than the training


@dataclass(frozen=True)
class Scores:
    """What was measured on the validation images.

    Attributes:
        trained: for each contestant, the scores of each seed's final run, by the names in `table.SCORES`.
        random: for each contestant, those of the same weights before the first step.
        pixels: those of the raw pixels.
    """

    trained: list[list[dict[str, float]]]
    random: list[list[dict[str, float]]]
    pixels: dict[str, float]


def measure_all(
    options: Options,
    contestants: Sequence[Contestant],
    trained: Sequence[Trained],
    *,
    images: Images,
    directory: ComparisonDirectory,
    say: Say,
) -> Scores:
    """Measure everything that has not been measured yet."""

    def probed(model: Any) -> dict[str, float]:
        return _probe(model, options, images) if images.classes else {}

    def finished(run: Any) -> dict[str, float]:
        model = load_autoencoder(run)
        return {**_complete(model, images), **probed(model)}

    def score(key: str, measure: Any, subject: Any) -> dict[str, float]:
        say(f"measuring {key}")
        return directory.score(key, lambda: measure(subject))

    return Scores(
        trained=[
            [score(f"{c.name}/seed-{seed}", finished, run) for seed, run in enumerate(one.runs)]
            for c, one in zip(contestants, trained, strict=True)
        ],
        random=[
            [score(f"{c.name}/random-{seed}", probed, c.fresh(seed)) for seed in range(options.seeds)]
            for c in contestants
        ],
        pixels=score("pixels", probed, f"pixels:{min(_PIXELS_SIDE, *contestants[0].model.image_size)}"),
    )


def _complete(model: MaskedAutoencoder, images: Images) -> dict[str, float]:
    """Completions of the same images with the same masks for all."""
    c = model.config
    transform = evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)
    chosen = fixed_sample(len(images.val), _MOST_COMPLETED)
    read = read_images(images.val, transform, chosen, _MOST_COMPLETED)
    (score,) = completion_scores(model, read.images, [MASK_RATIO])
    return {"psnr": score.psnr, "ssim": score.ssim, "mse": score.mse}


def _probe(model: Any, options: Options, images: Images) -> dict[str, float]:
    found: dict[str, float] = {}

    def run(train: Features, val: Features, _classes: list[str]) -> list[None]:
        assert train.labels is not None and val.labels is not None, "whoever asks has seen that there are labels"
        data = (train.values, train.labels, val.values, val.labels)
        found["knn"] = knn_probe(*data, k=NEIGHBOURS).top1.value
        found["linear"] = linear_probe(*data).top1.value
        return [None]

    # Raw pixels have one layer and one pooling, whatever is wanted of the encoders.
    wanted = extraction(options) if not isinstance(model, str) else Extraction(workers=options.workers)
    probe(model, images.train, images.val, run, extraction=wanted)
    return found
