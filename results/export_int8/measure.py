"""What 8-bit weights cost an encoder in ONNX: accuracy of a linear probe, size, time.

    python results/export_int8/measure.py cifar10/train.parquet cifar10/test.parquet

The linear probe is that of `crate-mae eval linear`, on the class token and the mean of patches of the last layer, from
the first 10,000 training images.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import crate_mae
from crate_mae.data import open_source
from crate_mae.data.base import ImageSource
from crate_mae.data.dataset import ImageDataset, collate
from crate_mae.data.transforms import Preparation, evaluation_transform
from crate_mae.deployment.formats import onnx_runner
from crate_mae.evaluation.probes import linear_probe

MODEL, TRAINING_IMAGES, BATCH = "trained_models/crate_mae_micro_cifar10", 10_000, 200


def embeddings(
    source: ImageSource, count: int, run: Callable[[dict[str, Tensor]], dict[str, Tensor]], transform: Preparation
) -> tuple[np.ndarray, float]:
    """Embeddings of the first images of a source, and images a second of the network alone."""
    dataset = ImageDataset(source, transform)
    values, seconds = [], 0.0
    for start in range(0, count, BATCH):
        images = collate([dataset[i] for i in range(start, min(start + BATCH, count))]).images
        began = time.perf_counter()
        values.append(run({"images": images})["embedding"].numpy())
        seconds += time.perf_counter() - began
    return np.concatenate(values), count / seconds


def main(train_path: str, test_path: str) -> None:
    """Export, embed, probe, and write `int8.json`."""
    torch.set_num_threads(1)
    train, test = open_source(train_path), open_source(test_path)
    config = crate_mae.load(MODEL).config
    transform = evaluation_transform(config.image_size, config.in_chans, config.mean, config.std)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for int8 in (False, True):
            exported = crate_mae.export(MODEL, out=Path(scratch) / str(int8), format="onnx", int8=int8)
            run = onnx_runner(exported.path)
            x, _ = embeddings(train, TRAINING_IMAGES, run, transform)
            y, speed = embeddings(test, len(test), run, transform)
            result = linear_probe(x, np.asarray(train.labels[:TRAINING_IMAGES]), y, np.asarray(test.labels))
            row = {"weights": "int8" if int8 else "float32", "megabytes": exported.bytes / 1e6}
            rows.append(row | {"images_per_second": speed, "top1": result.top1, "c": result.c})
    text = json.dumps(rows, indent=2, default=vars) + "\n"
    Path(__file__).with_name("int8.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
