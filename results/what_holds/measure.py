"""Every claim about single images, in every image: the bundled models on whole test sets.

    python results/what_holds/measure.py cifar10=cifar10/test.parquet photos=PHOTOS digits=digits:test

`crate-mae inspect` measures 256 images, and asks of a claim more than this page does: a mean margin, a correction for
many claims, and untrained networks. Here a claim is only counted: in how many images the value changes in the claimed
direction, and in how many the step beats all of its controls. Writes every_image.csv, after each model and set of
images; pairs of a model and a set that are in it already are not measured again.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import crate_mae
from crate_mae.data import open_source
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.audit import NO_CHANGE, Measured, Place
from crate_mae.interpret.steps import measure_claims

MODELS = ("crate_mae_micro_compressing_cifar10", "crate_mae_micro_monotone_cifar10", "crate_mae_micro_cifar10")
AT_ONCE = 250  # images
COLUMNS = ("model", "data", "images", "part", "layer", "claim", "before", "after", "as_claimed", "beats_controls")
FILE = Path(__file__).with_name("every_image.csv")
Row = dict[str, object]


def main(*named: str) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    for name, _, data in (each.partition("=") for each in named):
        for model in MODELS:
            rows = read_rows()
            if not any((row["model"], row["data"]) == (model, name) for row in rows):
                rows += [{"model": model, "data": name, **row} for row in measure(model, data)]
                write_rows(rows)


def measure(model: str, data: str) -> Iterator[Row]:
    """Every claim about single images."""
    net: nn.Module = crate_mae.load(model).eval()
    source, transform = open_source(data), open_backbone(net).transform()
    batches: list[dict[Place, dict[str, Tensor]]] = []
    for first in range(0, len(source), AT_ONCE):
        few = range(first, min(first + AT_ONCE, len(source)))
        images = read_images(source, transform, few, AT_ONCE).images
        measured = measure_claims(net, {"all": [images]}, pools=False)
        batches.append(
            {place: {key: numbers(each) for key, each in found.items()} for place, found in measured.items()}
        )
    for place, found in batches[0].items():
        for claim in found:
            before, after, as_claimed, beats = torch.cat([batch[place][claim] for batch in batches]).unbind(1)
            yield {
                "images": len(before),
                "part": place.part,
                "layer": place.layer,
                "claim": claim,
                "before": f"{before.mean():.4g}",
                "after": f"{after.mean():.4g}",
                "as_claimed": "" if as_claimed.isnan().any() else f"{as_claimed.mean():.4f}",
                "beats_controls": f"{beats.mean():.4f}",
            }


def numbers(measured: Measured) -> Tensor:
    """A row an image: the value before and after, whether it changes as claimed, and whether by more than in controls.

    Claims without the control "no change" have no change to count.
    """
    margins = {name: margin.double() for name, margin in measured.margins.items()}
    best = torch.stack(list(margins.values())).amin(0)
    changes = margins[NO_CHANGE] > 0 if NO_CHANGE in margins else torch.full_like(best, torch.nan)
    return torch.stack([measured.before.double(), measured.after.double(), changes.double(), (best > 0).double()], 1)


def read_rows() -> list[Row]:
    """What has been measured."""
    if not FILE.exists():
        return []
    with FILE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[Row]) -> None:
    """The table, whole."""
    lines = [",".join(COLUMNS), *(",".join(str(row[key]) for key in COLUMNS) for row in rows)]
    write_whole(FILE, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
