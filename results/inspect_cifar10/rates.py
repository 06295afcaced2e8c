"""R^c as the official code takes it, or its stand-in by value projections, of two trained networks and random weights.

    python results/inspect_cifar10/rates.py cifar10/test.parquet RUN_OF_vit_mae_micro_matched_patch4_32

The 256 test images are those of `crate-mae inspect`, which measures both networks in the same way; here random weights
are drawn three times. Writes rates.csv beside itself.
"""

import csv
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.data import open_source
from crate_mae.data.facts import fixed_sample
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret import layer_measures as measures
from crate_mae.interpret.layer_measures import LayerMeasure, Values, stream
from crate_mae.interpret.measure import Opened, open_measurable, untrained_twin
from crate_mae.interpret.statistics import Row
from crate_mae.theory.coding_rate import official_subspace_coding_rate
from crate_mae.theory.subspaces import project

MODEL, IMAGES, BATCH, SEED = "trained_models/crate_mae_micro_cifar10", 256, 32, 0
RANDOM_SEEDS = (1, 2, 3)


def main(test: str, vit: str) -> None:
    """Measure, and write down after every network."""
    torch.set_num_threads(1)
    with Path(__file__).with_name("rates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", "weights", "layer", "measure", "point", "mean", "spread", "n"])
        for name, model in (("ViT-MAE twin", vit), (Path(MODEL).name, MODEL)):
            trained = open_measurable(model, SEED)
            for seed in (None, *RANDOM_SEEDS):
                network = trained if seed is None else untrained_twin(trained, seed)
                assert network is not None, "both say how they are built"
                weights = "trained" if seed is None else f"random, seed {seed}"
                for row in rates(network, test):
                    numbers = [f"{row.mean:.3f}", f"{row.spread:.3f}", row.n]
                    writer.writerow([name, weights, row.layer, row.measure, row.point, *numbers])


def rates(network: Opened, test: str) -> list[Row]:
    """Of every layer of the encoder, before, between and after its steps."""
    source = open_source(test)
    chosen = fixed_sample(len(source), IMAGES, SEED)
    images = read_images(source, network.backbone.transform(), chosen, IMAGES).images
    wanted = [
        LayerMeasure(measures.SUBSPACES, measures.POINTS, _official, measures.has_subspaces),
        LayerMeasure(measures.STAND_IN, measures.POINTS, measures.value_rates, measures.has_value_projections),
    ]
    return stream(network.backbone.encoder, list(images.split(BATCH)), wanted)


def _official(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    norm, u = measures.attention_norm(layer), measures.bases(layer)
    projected = (project(measures.normalised(norm, tokens), u) for tokens in points)
    pairs = zip(measures.POINTS, projected, strict=True)
    return {("subspace_rate_official", point): official_subspace_coding_rate(w) for point, w in pairs}


if __name__ == "__main__":
    main(*sys.argv[1:])
