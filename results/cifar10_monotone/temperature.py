"""What the inverse temperature does: the bundled model with s of every encoder head times a factor.

    python results/cifar10_monotone/temperature.py cifar10/train.parquet cifar10/test.parquet

Nothing is trained but a linear probe of the last layer (class token and mean of the patches): on 4,000 training images,
evaluated on 2,000 test images. Measured on 500 of these: the loss with 75% of the patches hidden, the share of
attention that tokens give to themselves, and R^c before and after each attention step. With a factor of 0.001,
attention is uniform; "P = I" is without mixing. Writes temperature.csv.
"""

import csv
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

import crate_mae
from crate_mae.data import ImageSource, open_source
from crate_mae.data.base import Part
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import linear_probe
from crate_mae.evaluation.reconstruction import nested_masks, read_images
from crate_mae.interpret.audit import COMPRESS, MeasuredStep
from crate_mae.interpret.layer_measures import layer_measures, stream
from crate_mae.interpret.steps import measure_claims

MODEL = "crate_mae_micro_monotone_cifar10"
FACTORS = (0.001, 0.25, 0.5, 1, 2, 4, 16)
PROBE_TRAIN, PROBE_TEST, IMAGES = 4000, 2000, 500
C = 0.01  # as in results/monotone_layers


def main(train_data: str, test_data: str) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    train, test = (
        Part(open_source(train_data), np.arange(PROBE_TRAIN)),
        Part(open_source(test_data), np.arange(PROBE_TEST)),
    )
    rows = []
    for factor in (*FACTORS, "P = I"):
        model: nn.Module = crate_mae.load(MODEL).eval()
        if isinstance(factor, str):
            change = crate_mae.intervene(model, {"encoder.blocks.*.attn": 0})
        else:
            change = nullcontext()
            for block in model.encoder.blocks:
                block.attn.log_scale.data.add_(math.log(factor))
        with change:
            rows.append({"factor": factor, **measured(model, train, test)})
    rows[-1]["self_attention"] = " ".join(["1"] * len(model.encoder.blocks))  # its attention is not asked for
    with Path(__file__).with_name("temperature.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def measured(model: nn.Module, train: ImageSource, test: ImageSource) -> dict[str, str]:
    """The numbers of a row; those of layers are separated by spaces."""
    backbone = open_backbone(model)
    how = Extraction(layers="all", pooling="cls+mean", workers=0, cache=False)
    x, y = (extract(backbone, part, how)[-1].values for part in (train, test))
    accuracy = linear_probe(x, train.labels, y, test.labels, grid=(C,)).top1.value
    images = read_images(test, backbone.transform(), range(IMAGES), IMAGES).images
    loss = model(images, mask=nested_masks(IMAGES, model.num_patches, 0.75, seed=0)).loss
    own = [
        row
        for row in stream(model, images.split(50), layer_measures())
        if (row.measure, row.part) == ("self_attention", "encoder")
    ]
    claims = measure_claims(model, {"all": list(images.split(50))}, pools=False)
    falls = [claims[MeasuredStep("all", "encoder", row.layer)][COMPRESS] for row in own]
    return {
        "linear": f"{100 * accuracy:.1f}",
        "loss": f"{float(loss):.4f}",
        "self_attention": " ".join(f"{row.mean:.3f}" for row in own),
        "rate_before": " ".join(f"{float(each.before.mean()):.1f}" for each in falls),
        "rate_after": " ".join(f"{float(each.after.mean()):.1f}" for each in falls),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
