"""What each piece of the monotone layer is for: the recipe `small_color`, a piece changed at a time, three seeds.

    python results/monotone_layers/measure.py cifar10/train.parquet RUNS [NAME ...]

Each trial is a run of `crate_mae.pretrain` in RUNS on the first 45,000 training images; one that has been probed is not
made again. Every variant searches its learning rate alike, with seed 0: at the rates of `RATES`, and the one with the
lowest held-out loss is run with the other seeds (README.md names the variants for which this was not done).
"NAME, 6500 steps" is a variant at that rate for 6,500 steps, the full length of the recipe; "NAME, float32" is one in
float32, for processors without bfloat16. Labels of the first 10,000
images are for the probes, and they are evaluated on the last 5,000 training images, the audit on the first 64 of these.
No test image has a part in it. Results: trials.csv, one line a run; claims.csv, one line for each claim about each
layer of the audited runs; summary.csv, both over seeds. Lines of runs that are not in RUNS stay as they are.

The rule, written before the runs: a variant is better or worse than another if the means over seeds of its linear probe
at the last layer differ by more than twice the standard error of that difference, with the pooled deviation of seeds.
"""

import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pieces import Pieces, installed
from torch import nn

import crate_mae
from crate_mae.data import ImageSource, open_source
from crate_mae.data.base import Part
from crate_mae.data.documents import to_csv
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import knn_probe, linear_probe
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.audit import MeasuredStep, audit
from crate_mae.interpret.steps import measure_claims
from crate_mae.training.recipes import read_recipe

STEPS, SEEDS, RATES = 1000, (0, 1, 2), (3.6e-3, 1.08e-2)
LONG, FLOAT32 = ", 6500 steps", ", float32"
SEEN, LABELLED, ASKED, AUDITED = 45_000, 10_000, 5_000, 64
C = 0.01  # as in results/cifar10_ablations: of 0.001, 0.003, 0.01, 0.03 and 0.1 the best for the recipe
HERE = Path(__file__).parent
ALWAYS: dict[str, Any] = {
    "model": "crate_mae_micro_wide_patch4_32",
    "batch_size": 64,
    "precision": "bfloat16",
    "threads": 1,
    "workers": 0,
    "trackers": (),
    "quiet": True,
}

PUBLISHED = Pieces("free", "published", "softmax", "fixed", dictionary="published")
# A learned temperature was found to buy nothing, so what follows it in the table is compared with a fixed one.
FIXED = Pieces(temperature="fixed")
ONE_STEP = {"layer": "monotone", "ista_steps": 1}  # as all monotone layers took before two were found to be better
# name: settings of the model, and the pieces of its layers where these are none of the library's.
VARIANTS: dict[str, tuple[dict[str, Any], Pieces | Literal["unmixed"] | None]] = {
    "published": ({}, None),
    "tied": ({"output_projection": "tied"}, None),
    "orthogonal U": ({}, PUBLISHED._replace(subspaces="orthogonal")),
    "+ descent from X": ({}, PUBLISHED._replace(subspaces="orthogonal", step="descent")),
    "+ balanced": ({}, FIXED._replace(dictionary="published")),
    "+ symmetric": ({}, FIXED._replace(membership="symmetric", dictionary="published")),
    "+ symmetric, learned temperature": ({}, Pieces(membership="symmetric", dictionary="published")),
    "+ bounded D": ({}, FIXED._replace(dictionary="bounded")),
    "+ from zero": ({}, FIXED),
    "compressing": ({"layer": "compressing"}, None),
    "monotone": ({"layer": "monotone"}, None),
    "monotone, one step": (ONE_STEP, None),
    "published, no mixing in the encoder": ({}, "unmixed"),
    "monotone, no mixing in the encoder": ({"layer": "monotone"}, "unmixed"),
    "encoder: kappa > 0": (ONE_STEP, Pieces(encoder_rate="above 0", sides="encoder")),
    "decoder: kappa < 1": (ONE_STEP, Pieces(decoder_rate="below 1", sides="decoder")),
    "decoder: softmax": (ONE_STEP, Pieces(membership="softmax", sides="decoder")),
    "decoder: from Y_half": (
        ONE_STEP,
        PUBLISHED._replace(subspaces="orthogonal", membership="balanced", temperature="learned", sides="decoder"),
    ),
    "decoder: from Y_half, softmax": (
        ONE_STEP,
        PUBLISHED._replace(subspaces="orthogonal", sides="decoder"),
    ),
    "decoder: tied": (ONE_STEP, PUBLISHED._replace(sides="decoder")),
    "one U for all layers": ({}, FIXED._replace(shared=True)),
    "relu alone": ({}, FIXED._replace(dictionary="none")),
    "bounded D from relu(X)": ({}, FIXED._replace(dictionary="relu")),
    "two steps from zero": ({}, FIXED._replace(dictionary="zero two")),
    "learned threshold": ({}, FIXED._replace(threshold="learned")),
    "monotone, threshold 2": ({"layer": "monotone", "threshold": 2.0}, None),
    "monotone, 3 x 608": (ONE_STEP | {"embed_dim": 608}, None),
    "monotone, 4 x 512": (ONE_STEP | {"depth": 4}, None),
    "compressing, no mixing in the encoder": ({"layer": "compressing"}, "unmixed"),
    "monotone, 6 x 384": ({"layer": "monotone", "depth": 6, "embed_dim": 384, "num_heads": 6}, None),
    "compressing, 6 x 384": ({"layer": "compressing", "depth": 6, "embed_dim": 384, "num_heads": 6}, None),
    "compressing, 12 x 256": ({"layer": "compressing", "depth": 12, "embed_dim": 256, "num_heads": 4}, None),
}
# "+ balanced" is also ISTA as published, and "+ bounded D" the step from X, where dictionaries are compared.
# "+ symmetric" replaces "+ balanced"; with a learned temperature, "compressing".


def main(data: str, runs: str, *names: str) -> None:
    """Make what is missing of the named variants, and write the table of all that exist."""
    torch.set_num_threads(1)
    source = open_source(data)
    for name in names or VARIANTS:
        searched = [trial(source, Path(runs), name.replace(LONG, ""), SEEDS[0], lr) for lr in RATES]
        best = min(searched, key=lambda found: found["loss"])["lr"]
        for seed in SEEDS:
            claims(trial(source, Path(runs), name, seed, best)["folder"], name, source)
        write_tables(Path(runs))


def folder_of(runs: Path, variant: str, seed: int, lr: float, **_scores: object) -> Path:
    """The folder of a run."""
    return runs / f"{variant.replace(' ', '_')}_seed{seed}_lr{lr:g}"


def layers_of(name: str) -> tuple[dict[str, Any], Pieces | Literal["unmixed"] | None]:
    """The variant that a run's name begins with."""
    return VARIANTS[name.removesuffix(FLOAT32).removesuffix(LONG)]


def trial(source: ImageSource, runs: Path, name: str, seed: int, lr: float) -> dict[str, Any]:
    """One run and its probes, made or read."""
    folder = folder_of(runs, name, seed, lr)
    scores = folder / "scores.json"
    if not scores.exists():
        settings, pieces = layers_of(name)
        length = {"steps": STEPS, "warmup_epochs": 0.2, "monitor_steps": STEPS}
        if LONG in name:
            length = {"steps": 6500, "warmup_epochs": 0.5, "monitor_steps": 650}
        with installed(pieces):
            options = {**ALWAYS, **length, "seed": seed, "lr": lr}
            if name.endswith(FLOAT32):
                options["precision"] = "float32"
            found = {"variant": name, "seed": seed, "lr": lr, **trained(source, folder, settings, options)}
            found["probes"] = probes(found.pop("model"), source)
        write_whole(scores, json.dumps(found, indent=1).encode())
    return json.loads(scores.read_text()) | {"folder": folder}


def trained(source: ImageSource, folder: Path, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A model by the options of the recipe and the given ones; its minutes and losses."""
    start = time.perf_counter()
    options = {**read_recipe("small_color").options, **given}
    run = crate_mae.pretrain(Part(source, np.arange(SEEN)), out=folder, model_settings=settings, **options)
    minutes = (time.perf_counter() - start) / 60
    losses = [row["held_out_loss"] for row in run.metrics() if row["held_out_loss"] is not None]
    model = run.model()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"model": model, "parameters": parameters, "minutes": minutes, "loss": losses[-1]}


def probes(model: nn.Module, source: ImageSource) -> list[dict[str, float]]:
    """Accuracy of a linear classifier and of k-NN by layer, class token and mean of the patches."""
    labels = source.labels
    assert labels is not None, "CIFAR-10 has labels"
    parts = np.arange(LABELLED), np.arange(len(source) - ASKED, len(source))
    how = Extraction(layers="all", pooling="cls+mean", workers=0, cache=False)
    backbone = open_backbone(model)
    train, asked = ([layer.values for layer in extract(backbone, Part(source, part), how)] for part in parts)
    found = []
    for x, y in zip(train, asked, strict=True):
        known = x, labels[parts[0]], y, labels[parts[1]]
        linear, knn = linear_probe(*known, grid=(C,)).top1.value, knn_probe(*known).top1.value
        found.append({"linear": linear, "knn": knn})
    return found


def claims(folder: Path, name: str, source: ImageSource) -> list[dict[str, Any]]:
    """The audit of a run's model, without untrained draws: made or read.

    "share" is that of images in which a claim beats all its controls, "change" that in which the value changes as is
    claimed; "before" and "after" are means over images.
    """
    file = folder / "claims.json"
    if not file.exists():
        with installed(layers_of(name)[1]):
            model = crate_mae.load(folder).eval()
        asked = range(len(source) - ASKED, len(source))
        images = read_images(source, open_backbone(model).transform(), asked, AUDITED).images
        measured = measure_claims(model, {"all": [images]})
        found = []
        for row in audit(measured):
            changed = measured[MeasuredStep("all", row.part, row.layer)][row.claim].changes_as_claimed()
            if row.share_of_images is None:  # a claim about all images at once
                changed = None
            found.append(
                {
                    "layer": row.place,
                    "claim": row.claim,
                    "before": row.before,
                    "after": row.after,
                    "change": None if changed is None else float(changed.double().mean()),
                    "share": row.share_of_images,
                    "margin": row.margin_share,
                    "closest_control": row.closest_control,
                    "holds": row.holds,
                }
            )
        write_whole(file, json.dumps(found, indent=1).encode())
    return json.loads(file.read_text())


def write_tables(runs: Path) -> None:
    """trials.csv, claims.csv and summary.csv beside this file, in the order of `VARIANTS`."""
    found = [json.loads(path.read_text()) for path in runs.glob("*/scores.json")]
    order = [name + length for name in VARIANTS for length in ("", LONG, FLOAT32)]
    found.sort(key=lambda each: (order.index(each["variant"]), each["lr"], each["seed"]))
    rows = [
        {
            **{key: each[key] for key in ("variant", "seed", "lr", "parameters")},
            "minutes": "" if each["minutes"] is None else f"{each['minutes']:.1f}",  # None: interrupted
            "loss": f"{each['loss']:.4f}",
            **{f"{p}_by_layer": " ".join(f"{100 * x[p]:.1f}" for x in each["probes"]) for p in ("linear", "knn")},
        }
        for each in found
    ]
    write_csv("trials.csv", rows, order)
    audited = [(each, file) for each in found if (file := folder_of(runs, **each) / "claims.json").exists()]
    write_csv(
        "claims.csv",
        [
            {"variant": each["variant"], "seed": each["seed"], "lr": each["lr"], **row}
            for each, file in audited
            for row in json.loads(file.read_text())
        ],
        order,
    )
    write_summary()


def write_csv(name: str, rows: list[dict[str, Any]], order: list[str]) -> None:
    """Put the lines of runs into a table beside this file, in place of their former ones."""

    def run_of(row: dict[str, Any]) -> tuple[int, float, int]:
        return order.index(row["variant"]), float(row["lr"]), int(row["seed"])

    found = {run_of(row) for row in rows}
    kept = [row for row in read_csv(name) if run_of(row) not in found]
    write_rows(name, sorted([*kept, *rows], key=run_of))


def write_summary() -> None:
    """summary.csv: means and sample deviations over the seeds of a variant, and the claims of its audits by layer.

    For a claim about single images, the share of images in which it beats its controls, mean over seeds; for
    one about all images together, in how many of the audited seeds it holds.
    """
    trials, claims = (
        groupby(read_csv(name), key=lambda row: (row["variant"], row["lr"])) for name in ("trials.csv", "claims.csv")
    )
    audits = {variant: list(rows) for variant, rows in claims}
    names = list(dict.fromkeys(row["claim"] for rows in audits.values() for row in rows))
    table = []
    for variant, group in trials:
        rows, audited = list(group), audits.get(variant, [])
        layers = {
            key: zip(*(map(float, row[key].split()) for row in rows), strict=True)
            for key in ("linear_by_layer", "knn_by_layer")
        }
        table.append(
            {
                "variant": variant[0],
                "lr": variant[1],
                "seeds": " ".join(row["seed"] for row in rows),
                "parameters": rows[0]["parameters"],
                "loss": _over_seeds([float(row["loss"]) for row in rows], 3),
                **{key: ", ".join(_over_seeds(values, 1) for values in found) for key, found in layers.items()},
                "audited": len({row["seed"] for row in audited}),
                **{name: _by_layer([row for row in audited if row["claim"] == name]) for name in names},
            }
        )
    write_rows("summary.csv", table)


def _over_seeds(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _by_layer(rows: list[dict[str, str]]) -> str:
    cells = []
    for layer in sorted({row["layer"] for row in rows}, key=lambda name: (name[0], int(name[1:]))):
        seeds = [row for row in rows if row["layer"] == layer]
        if seeds[0]["share"]:
            cells.append(f"{100 * statistics.mean(float(row['share']) for row in seeds):.0f}%")
        else:
            cells.append(f"{sum(row['holds'] == 'True' for row in seeds)} of {len(seeds)}")
    return ", ".join(cells)


def read_csv(name: str) -> list[dict[str, str]]:
    """The lines of a table beside this file."""
    with (HERE / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a table beside this file."""
    write_whole(HERE / name, to_csv(list(rows[0]), [[row.get(column) for column in rows[0]] for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
