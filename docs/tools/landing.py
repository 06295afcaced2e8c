"""Draw the first picture of the README: completions by a bundled model, and R^c of its layers against their controls.

    python -m docs.tools.landing cifar10/test.parquet       # writes docs/pictures/landing.png

The curves are the audit's, in `results/cifar10_monotone/audit.csv`.
"""

import csv
import sys
from pathlib import Path

import torch

import crate_mae
from crate_mae.data.sources import open_source
from crate_mae.data.transforms import evaluation_transform
from crate_mae.drawing.style import GREY, colour, encode, new_figure
from crate_mae.models.completion import complete
from crate_mae.models.masking import random_mask

ROOT = Path(__file__).resolve().parents[2]
MODEL = "crate_mae_micro_monotone_cifar10"
AUDIT = ROOT / "results" / "cifar10_monotone" / "audit.csv"
IMAGES = 7  # evenly spaced among all
ROWS = ("original", "masked", "completed")


def main(data: str, out: Path = ROOT / "docs" / "pictures" / "landing.png") -> None:
    """Draw the picture from the test images of CIFAR-10."""
    figure = new_figure(12.0, 4.2)
    left, right = figure.subfigures(1, 2, width_ratios=(7, 4.2))
    _draw_completions(left, data)
    _draw_rates(right.subplots())
    out.write_bytes(encode(figure, "png"))


def _draw_completions(figure, data: str) -> None:  # noqa: ANN001  # a part of a figure
    model, source = crate_mae.load(MODEL).eval(), open_source(data)
    c = model.config
    prepare = evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)
    chosen = [len(source) * (2 * i + 1) // (2 * IMAGES) for i in range(IMAGES)]
    images = torch.stack([prepare(source.read(i)) for i in chosen])
    mask = random_mask(IMAGES, model.num_patches, 0.75, torch.Generator().manual_seed(0))
    pictures = complete(model, images, mask)._asdict()
    axes = figure.subplots(len(ROWS), IMAGES, squeeze=False)
    for line, row in zip(axes, ROWS, strict=True):
        for place, picture in zip(line, pictures[row], strict=True):
            place.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            for edge in place.spines.values():
                edge.set_visible(False)
        line[0].set_ylabel(row, fontsize=12)
    figure.suptitle("three quarters hidden, and completed (test images)", fontsize=12)


def _draw_rates(axes) -> None:  # noqa: ANN001  # of Matplotlib, which has no types
    with AUDIT.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if is_drawn(row)]
    layers = [int(row["layer"]) for row in rows]
    before, after, margin = ([float(row[name]) for row in rows] for name in ("before", "after", "margin"))
    best = [value + more for value, more in zip(after, margin, strict=True)]
    width = 0.26
    for shift, heights, shade, label in (
        (-width, before, "#c9c9c9", "before attention"),
        (0, best, GREY, "after the best control"),
        (width, after, colour(0), "after attention"),
    ):
        axes.bar([layer + shift for layer in layers], heights, width * 0.92, color=shade, label=label)
    for layer, x, y in zip(layers, before, after, strict=True):
        axes.annotate(f"−{1 - y / x:.0%}", (layer + width, y - 12), ha="center", va="top", color="white", fontsize=7.5)
    axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
    axes.set_ylim(0, 1.32 * max(before))
    axes.set_ylabel("subspace rate R$^c$ (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=10)
    axes.set_title("attention lowers R$^c$ (means of 256 images)", fontsize=12)


def is_drawn(row: dict[str, str]) -> bool:
    """Whether a row of the audit is about R^c of the model's own tokens, as they are, in the encoder."""
    wanted = {"subject": "model", "tokens": "all", "part": "encoder", "claim": "compress"}
    return all(row[name] == value for name, value in wanted.items())


if __name__ == "__main__":
    main(*sys.argv[1:2])
