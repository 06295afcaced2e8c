"""What other ways of training give on the same images, on the same core, in the same minutes.

    pip install lightly
    python results/peers/measure.py NAME TRAIN VAL RUNS --minutes 8 [--seeds 0 1] [--precision bfloat16]

TRAIN and VAL are folders with a folder for each class. All models see images of 64 pixels, in batches of 64:

- CRATE-MAE with monotone and with published layers, and the ViT-MAE of the size of the first: `crate_mae.pretrain` with
  the options of `small_color`.
- SimCLR (`lightly`) with a ResNet-18, and with the encoder of that ViT: NT-Xent loss at temperature 0.5, two random
  views.
- Supervised from random initialisation, with all labels and with a tenth of them: a ResNet-18 and the CRATE-MAE
  encoder, random crops of at least half an image and flips.

SimCLR and supervised training have AdamW and a learning rate that is warmed up for 5% of the steps and ends at zero, as
in `pretrain`. Minutes become steps by the speed of each method, which is measured first, in turns, with nothing else
running (`speeds.json` in RUNS); so what else runs during the trainings does not change what they give.

Each method searches its learning rate with seed 0: three rates for a quarter of the steps, and further ones until the
best has a worse one on both sides. That with the lowest loss is taken: on held-out images for the autoencoders, over
the last tenth of the steps for SimCLR, and on a tenth of the training images for supervised training. Features are
probed alike (`crate_mae.evaluation.probes`): every layer of encoders, the mean of the patches, and the pooled features
of the ResNet; next to each network with random initialisation. Results: NAME.csv, and NAME_speeds.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

import crate_mae
from crate_mae.data import open_source
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import knn_accuracy_on_tenth, knn_probe, linear_probe
from crate_mae.models.features import transform_of
from crate_mae.models.presets import preset
from crate_mae.models.weights import initialised
from crate_mae.training.optimizer import warmup_cosine
from crate_mae.training.recipes import read_recipe
from crate_mae.training.run_directory import RunDirectory, numbers

SIZE, BATCH, SEARCHED, HELD_OUT = 64, 64, 0.25, 10  # the share of the steps for each rate; every tenth image
FURTHER = 3.0  # a rate beyond the best, where that is the lowest or highest
MONOTONE, PUBLISHED, VIT, RESNET = (
    "crate_mae_micro_wide_monotone_patch8_64",
    "crate_mae_micro_wide_patch8_64",
    "vit_mae_micro_wide_monotone_matched_patch8_64",
    "resnet18",
)
ROUNDS, TIMED_STEPS = 3, 10
HERE = Path(__file__).parent
Row = dict[str, Any]


class Data(NamedTuple):
    """The images, and how they are computed with."""

    train: Path
    val: Path
    precision: str


class Trained(NamedTuple):
    """A model, the loss that it is chosen by, and how long a step took."""

    model: nn.Module
    loss: float
    seconds: float


def main() -> None:
    """Make what is missing, and write the table of what exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    data, runs = Data(given.train, given.val, given.precision), given.runs
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    speeds = kept(runs / "speeds.json", partial(speeds_in_turns, data))
    write_table(HERE / f"{given.name}_speeds.csv", [{"method": name, **row} for name, row in speeds.items()])
    for seed, method in itertools.product(given.seeds, given.methods):
        steps = round(60 * given.minutes / speeds[method]["seconds"])
        kept(runs / f"{method}_{seed}.json", partial(scored, method, seed, steps, data, runs))
        rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*_[0-9].json"))]
        write_table(HERE / f"{given.name}.csv", list(itertools.chain(*rows)))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What was made before, or is made now."""
    if not path.exists():
        write_whole(path, json.dumps(make(), indent=1).encode())
    return json.loads(path.read_text())


def write_table(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Speed and memory


def speeds_in_turns(data: Data) -> dict[str, Row]:
    """Seconds of a step, and the largest memory, of each method: the median of rounds, each in a process of its own."""
    measured: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for _, method in itertools.product(range(ROUNDS), METHODS):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            measured[method].append(process.submit(speed, method, data).result())
    return {
        method: {
            "seconds": statistics.median(seconds for seconds, _ in rounds),
            "images/s": round(BATCH / statistics.median(seconds for seconds, _ in rounds), 1),
            "slowest round": round(BATCH / max(seconds for seconds, _ in rounds), 1),
            "fastest round": round(BATCH / min(seconds for seconds, _ in rounds), 1),
            "memory, MiB": round(statistics.median(memory for _, memory in rounds)),
        }
        for method, rounds in measured.items()
    }


def speed(method: str, data: Data) -> tuple[float, float]:
    """Seconds of a step, and the memory of this process in MiB."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        seconds = METHODS[method].train(0, METHODS[method].rates[1], TIMED_STEPS, data, Path(folder)).seconds
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# One method


def scored(method: str, seed: int, steps: int, data: Data, runs: Path) -> list[Row]:
    """The scores of a method's network with random initialisation, and after its steps."""
    train = METHODS[method].train
    lr = best_rate(METHODS[method], steps, data, runs, runs / f"{method}_rates.json")
    trained = train(seed, lr, steps, data, runs)
    torch.manual_seed(seed)
    random = fresh(METHODS[method].network)
    shared = {"method": method, "seed": seed, "parameters": count(random)}
    return [
        {**shared, "weights": "random initialisation", "lr": "", "steps": 0, "loss": "", **probes(random, data)},
        {**shared, "weights": "trained", "lr": lr, "steps": steps, "loss": trained.loss, **probes(trained.model, data)},
    ]


def best_rate(method: Method, steps: int, data: Data, runs: Path, file: Path) -> float:
    """The learning rate of the lowest loss after a quarter of the steps, which has a worse one on both sides."""
    losses = {float(lr): loss for lr, loss in json.loads(file.read_text()).items()} if file.exists() else {}
    rates = list(method.rates)
    while True:
        for lr in rates:
            if lr not in losses:
                losses[lr] = method.train(0, lr, round(SEARCHED * steps), data, runs).loss
                write_whole(file, json.dumps(losses, indent=1).encode())
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            return best
        rates = [float(f"{best * FURTHER if best == max(losses) else best / FURTHER:.3g}")]


def fresh(network: str) -> nn.Module:
    """A network with random initialisation: a ResNet without its head, or an autoencoder."""
    return timm.create_model(RESNET, num_classes=0) if network == RESNET else initialised(preset(network))


def encoder_of(model: nn.Module) -> nn.Module:
    """The part that features come from."""
    return getattr(model, "encoder", model)


def count(model: nn.Module) -> int:
    """Trainable parameters of the encoder."""
    return sum(p.numel() for p in encoder_of(model).parameters() if p.requires_grad)


# Ways of training


def masked(network: str, seed: int, lr: float, steps: int, data: Data, runs: Path) -> Trained:
    """A masked autoencoder; its loss on held-out images."""
    out = runs / f"{network}_{seed}_{lr:g}_{steps}"
    given = read_recipe("small_color").options | {"model": network, "lr": lr, "steps": steps, "batch_size": BATCH}
    if not (out / "model.safetensors").exists():
        one_core = {"threads": 1, "workers": 0, "trackers": (), "quiet": True, "precision": data.precision}
        crate_mae.pretrain(data.train, out=out, seed=seed, **given, **one_core)
    rows = numbers(RunDirectory(out).metrics())
    losses = [row["held_out_loss"] for row in rows if row["held_out_loss"] is not None]
    speeds = [row["images_per_second"] for row in rows if row["images_per_second"] is not None]
    return Trained(crate_mae.load(out), losses[-1], BATCH / statistics.median(speeds))


def simclr(network: str, seed: int, lr: float, steps: int, data: Data, _: Path) -> Trained:
    """A network by SimCLR; its loss over the last tenth of the steps."""
    random_seed(seed)
    model = fresh(network)
    backbone = encoder_of(model)
    projected = nn.Sequential(Pooled(backbone), SimCLRProjectionHead(backbone.num_features, 512, 128))
    images = ImageFolder(str(data.train), transform=SimCLRTransform(input_size=SIZE, gaussian_blur=0.0))
    criterion = NTXentLoss(temperature=0.5)

    def loss_of(views: list[Tensor], _: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=data.precision == "bfloat16"):
            found = projected(torch.cat(views))
        return criterion(*found.float().chunk(2))

    losses, seconds = optimised(projected, images, loss_of, lr, steps)
    finite = all(map(math.isfinite, losses))
    return Trained(model, float(np.mean(losses[-math.ceil(steps / 10) :])) if finite else math.inf, seconds)


def supervised(network: str, seed: int, lr: float, steps: int, data: Data, _: Path, *, share: float) -> Trained:
    """A network with a linear classifier, by a share of the labels; its loss on a tenth of the training images."""
    random_seed(seed)
    model = fresh(network)
    backbone, whole = encoder_of(model), transform_of(preset(MONOTONE))
    augmented = Compose([RandomResizedCrop(SIZE, (0.5, 1.0)), RandomHorizontalFlip(), whole])
    images, held_out = (ImageFolder(str(data.train), transform=transform) for transform in (augmented, whole))
    others = [i for i in range(len(images)) if i % HELD_OUT]
    chosen = np.random.default_rng(seed).permutation(others)[: round(share * len(others))]
    classifier = nn.Sequential(Pooled(backbone), nn.Linear(backbone.num_features, len(images.classes)))

    def loss_of(views: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=data.precision == "bfloat16"):
            found = classifier(views)
        return F.cross_entropy(found.float(), labels)

    _, seconds = optimised(classifier, Subset(images, chosen), loss_of, lr, steps)
    classifier.eval()
    with torch.no_grad():
        batches = DataLoader(Subset(held_out, range(0, len(images), HELD_OUT)), batch_size=256)
        losses = [float(F.cross_entropy(classifier(views), labels)) for views, labels in batches]
    model.classifier = classifier[1]
    return Trained(model, float(np.mean(losses)), seconds)


def optimised(
    model: nn.Module, images: Dataset, loss_of: Callable[..., Tensor], lr: float, steps: int
) -> tuple[list[float], float]:
    """Train a model, and return the loss of each step and the median of their seconds."""
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.95))
    losses, seconds, start = [], [], time.perf_counter()
    model.train()
    for step, (views, labels) in zip(range(steps), endless(loader), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, round(0.05 * steps), lr, 0.0)
        loss = loss_of(views, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(-start + (start := time.perf_counter()))
    return losses, statistics.median(seconds)


def endless(loader: DataLoader) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


class Pooled(nn.Module):
    """Features of a backbone: pooled by a ResNet, the mean of the patches of an encoder."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """One vector for each image."""
        tokens = self.backbone.forward_features(images)
        return tokens.mean((2, 3)) if tokens.ndim == 4 else tokens[:, self.backbone.num_prefix_tokens :].mean(1)


class Method(NamedTuple):
    """How a network is trained, and the learning rates that are tried."""

    network: str
    train: Callable[[int, float, int, Data, Path], Trained]
    rates: tuple[float, ...]


def of(network: str, train: Callable[..., Trained], *rates: float, **how: float) -> Method:
    """A method: the functions above with their network."""
    return Method(network, partial(train, network, **how), rates)


METHODS = {  # rates of `pretrain` are for batches of 256
    "CRATE-MAE, monotone": of(MONOTONE, masked, 3.6e-3, 1.08e-2, 3.24e-2),
    "CRATE-MAE, published": of(PUBLISHED, masked, 1.2e-3, 3.6e-3, 1.08e-2),
    "ViT-MAE": of(VIT, masked, 1.2e-3, 3.6e-3, 1.08e-2),
    "SimCLR, ResNet-18": of(RESNET, simclr, 3e-4, 1e-3, 3e-3),
    "SimCLR, ViT": of(VIT, simclr, 3e-4, 1e-3, 3e-3),
    "supervised, ResNet-18": of(RESNET, supervised, 3e-4, 1e-3, 3e-3, share=1.0),
    "supervised, ResNet-18, a tenth": of(RESNET, supervised, 3e-4, 1e-3, 3e-3, share=0.1),
    "supervised, CRATE encoder": of(MONOTONE, supervised, 3e-4, 1e-3, 3e-3, share=1.0),
    "supervised, CRATE encoder, a tenth": of(MONOTONE, supervised, 3e-4, 1e-3, 3e-3, share=0.1),
}


# Scores


def probes(model: nn.Module, data: Data) -> Row:
    """Accuracies of the layer that is best on a tenth of the training images, and of the classifier if there is one."""
    (fitted, labels), (asked, true) = (features_of(model, folder) for folder in (data.train, data.val))
    linear = [linear_probe(x, labels, y, true) for x, y in zip(fitted, asked, strict=True)]
    knn = [
        (knn_accuracy_on_tenth(x, labels), knn_probe(x, labels, y, true)) for x, y in zip(fitted, asked, strict=True)
    ]
    layer = int(np.argmax([result.chosen_on for result in linear]))
    knn_layer = int(np.argmax([chosen_on for chosen_on, _ in knn]))
    return {
        "layer": layer,
        "linear": round(linear[layer].top1.value, 4),
        "knn_layer": knn_layer,
        "knn": round(knn[knn_layer][1].top1.value, 4),
        "classified": round(classified(model, data.val), 4) if hasattr(model, "classifier") else "",
    }


def features_of(model: nn.Module, folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of images by layer, and their labels."""
    source = open_source(str(folder))
    assert source.labels is not None, "there is a folder for each class"
    if isinstance(model, crate_mae.MaskedAutoencoder):
        how = Extraction(layers="all", pooling="mean", workers=0, cache=False)
        return [layer.values for layer in extract(open_backbone(model), source, how)], source.labels
    return [torch.cat([pooled for pooled, _ in pooled_batches(model, folder)]).numpy()], source.labels


def classified(model: nn.Module, folder: Path) -> float:
    """The accuracy of the classifier that a network was trained with."""
    right = [model.classifier(pooled).argmax(1) == labels for pooled, labels in pooled_batches(model, folder)]
    return torch.cat(right).float().mean().item()


@torch.no_grad()
def pooled_batches(model: nn.Module, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Pooled features of whole images, and their labels."""
    pooled = Pooled(encoder_of(model)).eval()
    for images, labels in DataLoader(ImageFolder(str(folder), transform=transform_of(preset(MONOTONE))), 256):
        yield pooled(images), labels


if __name__ == "__main__":
    main()
