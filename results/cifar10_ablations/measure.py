"""What moves a CRATE-MAE's features: the recipe `small_color` with one setting changed at a time, in short runs.

    python results/cifar10_ablations/measure.py cifar10/train.parquet RUNS [NAME ...]

Each trial is a run of `crate_mae.pretrain` in RUNS on the first 45,000 training images; one that has been probed is not
made again. Labels of the first 10,000 are for the probes, and they are evaluated on the last 5,000 training images.
No test image has a part in it. Results: trials.csv (of every trial the default features, by layer) and poolings.csv
(every layer and pooling). Two are not trained here: the recipe's network with random weights, and the model of the full
recipe, which is in the repository; that one has seen all training images, without their labels.
"""

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import crate_mae
from crate_mae.data import ImageSource, open_source
from crate_mae.data.base import Part
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import knn_probe, linear_probe
from crate_mae.training.recipes import read_recipe

STEPS, BATCH = 1000, 64
SEEN, LABELLED, ASKED = 45_000, 10_000, 5_000
C = 0.01  # of 0.001, 0.003, 0.01, 0.03 and 0.1 the best for the recipe
HERE = Path(__file__).parent
ALWAYS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": BATCH,
    "warmup_epochs": 0.2,
    "precision": "bfloat16",
    "threads": 1,
    "workers": 0,
    "monitor_steps": STEPS,
    "seed": 0,
    "trackers": (),
    "quiet": True,
}

# What differs from the recipe: options of `pretrain`, and settings of the model. Trials of depth cost about the same.
TRIALS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "lr x 3": {"lr": 1.08e-2},
    "lr / 3": {"lr": 1.2e-3},
    "50% hidden": {"mask_ratio": 0.5},
    "85% hidden": {"mask_ratio": 0.85},
    "patches of 8 pixels": {"model_settings": {"patch_size": 8}},
    "patches of 2 pixels": {"model_settings": {"patch_size": 2}},
    "plain targets": {"norm_pix_loss": False},
    "mask tokens at the encoder": {"mask_tokens": "encoder"},
    "threshold 0.1": {"model_settings": {"threshold": 0.1}},
    "threshold 1": {"model_settings": {"threshold": 1.0}},
    "step size 0.3": {"model_settings": {"step_size": 0.3}},
    "skip around ISTA": {"model_settings": {"ista_skip": True}},
    "CRATE-alpha's step": {"model_settings": {"ista_skip": True, "overcomplete": 4}},
    "tied output projection": {"model_settings": {"output_projection": "tied"}},
    "official start": {"model_settings": {"init": "official"}},
    "official start, lr / 3": {"lr": 1.2e-3, "model_settings": {"init": "official"}},
    "encoder 1 x 896": {"model_settings": {"depth": 1, "embed_dim": 896, "num_heads": 14}},
    "encoder 6 x 384": {"model_settings": {"depth": 6, "embed_dim": 384, "num_heads": 6}},
    "encoder 12 x 256": {"model_settings": {"depth": 12, "embed_dim": 256, "num_heads": 4}},
    "decoder of 1 layer": {"model_settings": {"decoder_depth": 1}},
    "decoder of 6 layers": {"model_settings": {"decoder_depth": 6}},
    "decoder 2 x 384": {"model_settings": {"decoder_embed_dim": 384}},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 0.2": {"weight_decay": 0.2},
    "no clipping": {"clip_grad": 0.0},
    "random crops from 20%": {"min_crop": 0.2},
    "ViT-MAE, same widths and depths": {"model": "vit_mae_micro_wide_patch4_32"},
    "ViT-MAE, lr / 3": {"model": "vit_mae_micro_wide_patch4_32", "lr": 1.2e-3},
}
UNTRAINED: dict[str, Callable[[], nn.Module]] = {
    "random weights": lambda: crate_mae.create_model(recipe()["model"]),
    "the full recipe": lambda: crate_mae.load("trained_models/crate_mae_micro_cifar10"),
}


def main(data: str, runs: str, *names: str) -> None:
    """Make what is missing of the named trials, and write the tables of all that exist."""
    torch.set_num_threads(1)
    source = open_source(data)
    for name in names or (*UNTRAINED, *TRIALS):
        folder = Path(runs) / name.replace(" ", "_").replace("/", "by")
        if not (folder / "scores.json").exists():
            found = {"trial": name, **(untrained(name) if name in UNTRAINED else trained(source, folder, TRIALS[name]))}
            found["probes"] = list(probes(found.pop("model"), source))
            write_whole(folder / "scores.json", json.dumps(found, indent=1).encode())
    every = [json.loads(path.read_text()) for path in Path(runs).glob("*/scores.json")]
    order = [*UNTRAINED, *TRIALS]
    write_tables(sorted(every, key=lambda trial: order.index(trial["trial"])))


def recipe() -> dict[str, Any]:
    """Options of the recipe that is varied, as it was then: with published layers, and their learning rate."""
    published = {"model": "crate_mae_micro_wide_patch4_32", "lr": 3.6e-3, "warmup_epochs": 0.5}
    return read_recipe("small_color").options | published


def untrained(name: str) -> dict[str, Any]:
    """A model that is not trained here."""
    with default_generator_seeded(0):
        model = UNTRAINED[name]()
    return {"model": model, "parameters": learned(model), "minutes": 0.0, "loss_before": None, "loss": None}


def trained(source: ImageSource, folder: Path, changed: dict[str, Any]) -> dict[str, Any]:
    """A model by the options of the recipe, those of all trials and those of this one; its minutes and losses."""
    start = time.perf_counter()
    options = {**recipe(), **ALWAYS, **changed}
    run = crate_mae.pretrain(Part(source, np.arange(SEEN)), out=folder, **options)
    minutes = (time.perf_counter() - start) / 60
    losses = [row["held_out_loss"] for row in run.metrics() if row["held_out_loss"] is not None]
    model = run.model()
    return {
        "model": model,
        "parameters": learned(model),
        "minutes": minutes,
        "loss_before": losses[0],
        "loss": losses[-1],
    }


def learned(model: nn.Module) -> int:
    """How many parameters are learned."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def probes(model: nn.Module, source: ImageSource) -> list[dict[str, Any]]:
    """Accuracy of k-NN and of a linear classifier by layer and pooling."""
    backbone, labels = open_backbone(model), source.labels
    assert labels is not None, "CIFAR-10 has labels"
    parts = np.arange(LABELLED), np.arange(len(source) - ASKED, len(source))
    how = Extraction(layers="all", pooling="cls+mean", workers=0, cache=False)
    both = [[layer.values for layer in extract(backbone, Part(source, part), how)] for part in parts]
    rows = []
    for layer, features in enumerate(zip(*both, strict=True)):
        width = features[0].shape[1] // 2
        columns = {"cls": slice(width), "mean": slice(width, None), "cls+mean": slice(None)}
        for pooling, chosen in columns.items():
            train, asked = (values[:, chosen] for values in features)
            known = train, labels[parts[0]], asked, labels[parts[1]]
            linear, knn = linear_probe(*known, grid=(C,)).top1.value, knn_probe(*known).top1.value
            rows.append({"layer": layer, "pooling": pooling, "linear": linear, "knn": knn})
    return rows


def write_tables(trials: list[dict[str, Any]]) -> None:
    """Two CSV files beside this one."""
    short, every = [], []
    for trial in trials:
        default = [row for row in trial["probes"] if row["pooling"] == "cls+mean"]
        short.append(
            {
                "trial": trial["trial"],
                "parameters": trial["parameters"],
                "minutes": f"{trial['minutes']:.1f}",
                **{key: "" if trial[key] is None else f"{trial[key]:.3f}" for key in ("loss_before", "loss")},
                **{f"{p}_by_layer": " ".join(f"{100 * row[p]:.1f}" for row in default) for p in ("linear", "knn")},
            }
        )
        every += [{"trial": trial["trial"], **row} for row in trial["probes"]]
    for name, rows in (("trials.csv", short), ("poolings.csv", every)):
        with (HERE / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
