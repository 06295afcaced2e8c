"""What the skip around the sparse-coding step does to what layers know, from the isometric and from the official start.

    python results/skip/measure.py digits digits:train digits:test RUNS
    python results/skip/measure.py cifar10 cifar10/train.parquet cifar10/test.parquet RUNS

Four models of six layers, with and without the skip and of either start, are trained alike and measured layer by layer,
next to the same four with fresh weights. Runs stay in RUNS; one that is whole is not made again, and one that was
interrupted goes on. Writes NAME.csv and NAME.png beside itself.
"""

import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import crate_mae
from crate_mae.data import open_source
from crate_mae.drawing.style import draw_line, encode, legend_above, new_figure, panels
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.information import (
    ProbeImages,
    feature_ranks,
    pixels_from_layers,
    probe_images,
    probe_rows,
)
from crate_mae.interpret.measure import Opened, open_measurable, untrained_twin
from crate_mae.interpret.statistics import Row, find
from crate_mae.models.features import evaluating

STARTS = ("isometric", "official")
MEASURES = {
    ("probe_accuracy", ""): "accuracy of a linear probe",
    ("feature_rank", "z_next"): "effective rank of images’ features",
    ("pixel_r2", "z_next"): "pixels told by tokens (R²)",
}
IMAGES, PROBED, SEED = 256, 5_000, 0
COMMON: dict[str, Any] = {
    "seed": SEED, "precision": "float32", "threads": 1, "workers": 0, "trackers": (), "quiet": True,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "crate_mae_nano_patch2_8",
        "model_settings": {"embed_dim": 48, "depth": 6, "decoder_embed_dim": 48, "decoder_depth": 6},
        "mask_tokens": "decoder",
        "mask_ratio": 0.5,
        "flip": False,
        "min_crop": 0.8,
        "steps": 240,
        "batch_size": 50,
        "monitor_steps": 240,
    },
    "cifar10": {
        "model": "crate_mae_micro_visible_patch4_32",
        "model_settings": {},
        "steps": 600,
        "batch_size": 32,
    },
}


class Subject(NamedTuple):
    """One line of the figure."""

    start: str
    skip: bool
    trained: bool
    rows: list[Row]

    @property
    def label(self) -> str:
        """For the legend."""
        return ("with the skip" if self.skip else "without (published)") + ("" if self.trained else ", fresh weights")


def main(name: str, train: str, test: str, runs: str) -> None:
    """Train, measure, draw."""
    torch.set_num_threads(1)
    images = probe_images(open_source(train), open_source(test), PROBED, SEED)
    found = []
    for start in STARTS:
        for skip in (False, True):
            model = open_measurable(_trained(name, Path(runs), train, start, skip), SEED)
            twin = untrained_twin(model, SEED + 1)
            assert twin is not None, "a run says how its model is built"
            found += [Subject(start, skip, it is model, _measured(it, images)) for it in (model, twin)]
    folder = Path(__file__).parent
    _write(found, folder / f"{name}.csv")
    (folder / f"{name}.png").write_bytes(_draw(found))


def _trained(name: str, runs: Path, data: str, start: str, skip: bool) -> Path:
    """The run of one model."""
    out = runs / f"{name}_{start}_{'skip' if skip else 'none'}"
    if not (out / "model.safetensors").exists():
        options = COMMON | RUNS[name]
        options["model_settings"] = options["model_settings"] | {"ista_skip": skip, "init": start}
        crate_mae.pretrain(data, out=out, **options)
    return out


def _measured(model: Opened, images: ProbeImages) -> list[Row]:
    """The encoder's layers, on test images."""
    encoder: Any = model.backbone.encoder
    _, test = images
    read = read_images(test, model.backbone.transform(), range(len(test)), IMAGES).images
    with evaluating(encoder):
        rows = feature_ranks(encoder, [read]) + pixels_from_layers(encoder, read, encoder.patch_embed.patch_size[0])
    probes, converged = probe_rows(model.backbone, images)
    if not converged:
        sys.stderr.write(f"A probe of {model.name} did not converge, and may know more than is shown.\n")
    return rows + probes


def _write(found: list[Subject], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["start", "ista_skip", "trained", "layer", "measure", "mean", "spread", "n", "over"])
        for subject in found:
            for row in subject.rows:
                numbers = [row.layer, row.measure, row.mean, row.spread, row.n, row.over]
                writer.writerow([subject.start, subject.skip, subject.trained, *numbers])


def _draw(found: list[Subject]) -> bytes:
    """A row of panels for each start, a panel for each measure."""
    figure = new_figure(11.0, 6.4)
    axes = panels(figure, len(STARTS), len(MEASURES), sharey="col", sharex=True)
    for line, start in zip(axes, STARTS, strict=True):
        for place, ((measure, point), title) in zip(line, MEASURES.items(), strict=True):
            for subject in (subject for subject in found if subject.start == start):
                rows = find(subject.rows, measure, point)
                style = {} if subject.trained else {"linestyle": "--", "markerfacecolor": "white"}
                layers, means = [row.layer for row in rows], [row.mean for row in rows]
                draw_line(place, layers, means, [0.0] * len(rows), int(subject.skip), subject.label, **style)
            place.set_title(f"{title}\n{start} start")
            place.set_xlabel("layer of the encoder" if start == STARTS[-1] else "")
    legend_above(figure, axes[0, 0], 4)
    return encode(figure, "png")


if __name__ == "__main__":
    main(*sys.argv[1:])
