"""Fine-tuning from the CIFAR-10 model against the same network from scratch, with 1%, 10% and 100% of the labels.

    python results/cifar10_finetuning/measure.py cifar10/train.parquet cifar10/test.parquet RUNS

Each run is one of `crate-mae finetune` and stays in RUNS; one that is finished is not made again. With few labels both
starts try the same learning rates; with all of them each takes the one that was best for it with 10%. The accuracy is
that of the last step on all test images, which chose nothing but these rates. Results: finetuning.csv.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import torch

import crate_mae
from crate_mae.models.autoencoder import build
from crate_mae.training.run_directory import Run

PRETRAINED = "trained_models/crate_mae_micro_cifar10"
RESULT = Path(__file__).with_name("finetuning.csv")
STEPS = {0.01: 160, 0.1: 390, 1.0: 782}  # 20, 5 and 1 epochs in batches of 64
RATES = (1.5e-3, 6e-3)  # per 256 images
OPTIONS: dict[str, Any] = {
    "batch_size": 64,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rand_augment": "",
    "min_crop": 0.6,
    "drop_path": 0.0,
    "precision": "float32",
    "threads": 1,
    "workers": 0,
    "seed": 0,
    "trackers": (),
    "quiet": True,
}
# A fresh network has no layers that know more than others.
STARTS = {"pretrained": {"layer_decay": 0.75}, "scratch": {"layer_decay": 1.0}}


def main(train: str, test: str, runs: str) -> None:
    """Train all, from few labels to many, and write down each as it ends."""
    torch.set_num_threads(1)
    models = {"pretrained": PRETRAINED, "scratch": str(fresh(Path(runs) / "fresh"))}
    best: dict[str, tuple[float, float]] = {}
    rows: list[dict[str, Any]] = []
    for share, steps in STEPS.items():
        for start, settings in STARTS.items():
            tried = []
            for rate in RATES if share < 1 else (best[start][1],):
                out = Path(runs) / f"{start}_{share:g}_{rate:g}"
                options = {**OPTIONS, **settings, "labels": share, "steps": steps, "lr": rate, "monitor_steps": steps}
                accuracy = learned(models[start], train, test, out, options)
                tried.append((accuracy, rate))
                rows.append({"labels": share, "start": start, "lr": rate, "steps": steps, "accuracy": accuracy})
                write(rows)
            best[start] = max(tried)


def fresh(folder: Path) -> Path:
    """The same network with random weights."""
    if not folder.exists():
        torch.manual_seed(0)
        model = build(crate_mae.load(PRETRAINED).config)
        crate_mae.save(model, folder)
    return folder


def learned(model: str, train: str, test: str, out: Path, options: dict[str, Any]) -> float:
    """Accuracy on all test images after the last step."""
    if not (out / "model.safetensors").exists():
        crate_mae.finetune(model, train=train, val=test, out=out, **options)
    measured = [row["val_accuracy"] for row in Run(out, None).metrics() if row["val_accuracy"] is not None]
    return measured[-1]


def write(rows: list[dict[str, Any]]) -> None:
    """The table so far."""
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
