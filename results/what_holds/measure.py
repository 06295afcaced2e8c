"""Every claim about single images, in every image: the trained models on whole test sets.

    python results/what_holds/measure.py cifar10=cifar10/test.parquet photos=PHOTOS digits=digits:test

`crate-mae inspect` measures 256 images, and asks of a claim more than this page does: a mean margin, a correction for
many claims, and untrained networks. Here a claim is only counted: in how many images the value changes in the claimed
direction, and in how many the step beats all of its controls. Models that were trained on visible patches are measured
on all tokens and on those of the visible patches. Writes every_image.csv, after each model and set of images; what is
in it already is not measured again.
"""

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import crate_mae
from crate_mae.data import open_source
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.audit import Measured, MeasuredStep, Tokens
from crate_mae.interpret.measure import masked_pass, token_views
from crate_mae.interpret.steps import measure_claims

MODELS = (
    "trained_models/crate_mae_micro_compressing_cifar10",
    "crate_mae_micro_monotone_cifar10",
    "trained_models/crate_mae_micro_cifar10",
)
AT_ONCE = 250  # images
MASK_RATIO = 0.75  # of their training
COLUMNS = (
    "model",
    "data",
    "tokens",
    "images",
    "part",
    "layer",
    "claim",
    "before",
    "after",
    "as_claimed",
    "beats_controls",
)
FILE = Path(__file__).with_name("every_image.csv")
Row = dict[str, object]


def main(*named: str) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    for name, _, data in (each.partition("=") for each in named):
        for model, tokens in itertools.product(MODELS, get_args(Tokens)):
            key: Row = {"model": Path(model).name, "data": name, "tokens": tokens}
            rows = read_rows()
            if not any(key.items() <= row.items() for row in rows):
                write_rows([*rows, *(key | row for row in measure(model, data, tokens))])


def measure(model: str, data: str, tokens: Tokens) -> Iterator[Row]:
    """Every claim about single images on these tokens; nothing if the model was trained on all tokens."""
    net = crate_mae.load(model).eval()
    if tokens == "visible" and net.config.mask_tokens == "encoder":
        return
    source, transform = open_source(data), open_backbone(net).transform()
    batches: list[dict[MeasuredStep, dict[str, Tensor]]] = []
    for first in range(0, len(source), AT_ONCE):
        few = range(first, min(first + AT_ONCE, len(source)))
        images = read_images(source, transform, few, AT_ONCE).images
        views = token_views(net, images, None, MASK_RATIO, seed=first, batch_size=AT_ONCE)
        measured = measure_claims(net, {tokens: views[tokens]}, masked_pass, pools=False)
        batches.append({step: {key: numbers(each) for key, each in found.items()} for step, found in measured.items()})
    for step, found in batches[0].items():
        for claim in found:
            before, after, as_claimed, beats = torch.cat([batch[step][claim] for batch in batches]).unbind(1)
            yield {
                "images": len(before),
                "part": step.part,
                "layer": step.layer,
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
    best = torch.stack(list(measured.margins.values())).amin(0)
    changes = measured.changes_as_claimed()
    if changes is None:
        changes = torch.full_like(best, torch.nan)
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
