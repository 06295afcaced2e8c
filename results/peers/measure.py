"""What other ways of pretraining give on the same images, on the same core, in the same minutes.

    pip install lightly
    python results/peers/measure.py NAME TRAIN VAL RUNS --minutes 20 [--seeds 0 1]

TRAIN and VAL are folders with a folder for each class. All models see images of 64 pixels:

- CRATE-MAE with monotone layers, and the ViT-MAE of its size: `crate_mae.pretrain` with the options of `small_color`.
- SimCLR (`lightly`) with a ResNet-18, and with the encoder of that ViT: NT-Xent loss at temperature 0.5, two random
  views, batches of 128, AdamW. The learning rate is warmed up for 5% of the time and ends at zero, as in `pretrain`.

Each searches its learning rate with seed 0: three rates for a quarter of the time, and the one with the lowest loss, on
held-out images for the autoencoders and on the last tenth of the steps for SimCLR, is taken. All are probed alike
(`crate_mae.evaluation.probes`), every layer of the autoencoders and of the ViT, and the pooled features of the
ResNet; next to each network with random initialisation. Results: NAME.csv.
"""

import argparse
import csv
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

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

SIZE, BATCH = 64, 128
CRATE, VIT = "crate_mae_micro_wide_monotone_patch8_64", "vit_mae_micro_wide_monotone_matched_patch8_64"
SEARCHED = 0.25  # of the time, for each learning rate
RATES = {  # for batches of 256 in pretrain, as they are for SimCLR
    "CRATE-MAE": (3.6e-3, 1.08e-2, 3.24e-2),
    "ViT-MAE": (1.2e-3, 3.6e-3, 1.08e-2),
    "SimCLR, ResNet-18": (3e-4, 1e-3, 3e-3),
    "SimCLR, ViT": (3e-4, 1e-3, 3e-3),
}
HERE = Path(__file__).parent
Row = dict[str, Any]


def main() -> None:
    """Make what is missing, and write the table of what exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(RATES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    for method, seed in itertools.product(options.methods, options.seeds):
        measured(options.runs / f"{method}_{seed}.json", lambda m=method, s=seed: list(entry(m, s, options)))
        rows = [row for path in sorted(options.runs.glob("*.json")) for row in json.loads(path.read_text())]
        with (HERE / f"{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measured(path: Path, make: Callable[[], list[Row]]) -> None:
    """Make and keep what does not exist."""
    if not path.exists():
        write_whole(path, json.dumps(make(), indent=1).encode())


def entry(method: str, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    """The probes of a method's network with random initialisation, and after its minutes."""
    train = by_simclr if method.startswith("SimCLR") else by_masking
    searched = options.runs / f"{method}_rate.txt"
    if not searched.exists():
        losses = {lr: train(method, 0, lr, SEARCHED * options.minutes, options)[1] for lr in RATES[method]}
        write_whole(searched, json.dumps({"losses": losses, "best": min(losses, key=losses.__getitem__)}).encode())
    lr = json.loads(searched.read_text())["best"]
    torch.manual_seed(seed)
    start = time.perf_counter()
    model, loss, images = train(method, seed, lr, options.minutes, options)
    minutes = (time.perf_counter() - start) / 60
    torch.manual_seed(seed)
    for state, each, seen in (("random initialisation", fresh(method), 0), ("trained", model, images)):
        yield {
            "method": method,
            "seed": seed,
            "weights": state,
            "lr": lr,
            "minutes": round(minutes, 1) if seen else 0,
            "images": seen,
            "loss": round(loss, 4) if seen else "",
            "parameters": sum(p.numel() for p in encoder_of(each).parameters() if p.requires_grad),
            **probes(each, options.train, options.val),
        }


def fresh(method: str) -> nn.Module:
    """A method's network with random initialisation."""
    if method == "SimCLR, ResNet-18":
        return timm.create_model("resnet18", num_classes=0)
    net = initialised(preset(CRATE if method == "CRATE-MAE" else VIT))
    return net.encoder if method.startswith("SimCLR") else net


def encoder_of(model: nn.Module) -> nn.Module:
    """What is probed."""
    return getattr(model, "encoder", model)


def by_masking(
    method: str, seed: int, lr: float, minutes: float, options: argparse.Namespace
) -> tuple[nn.Module, float, int]:
    """A masked autoencoder; its loss on held-out images, and the images seen."""
    out = options.runs / f"{method}_{seed}_{lr:g}_{minutes:g}"
    given = read_recipe("small_color").options | {"model": CRATE if method == "CRATE-MAE" else VIT, "lr": lr}
    del given["steps"]
    if not (out / "model.safetensors").exists():
        one_core = {"threads": 1, "workers": 0, "trackers": (), "quiet": True, "precision": "bfloat16"}
        crate_mae.pretrain(options.train, out=out, minutes=minutes, seed=seed, **given, **one_core)
    rows = numbers(RunDirectory(out).metrics())
    losses = [row["held_out_loss"] for row in rows if row["held_out_loss"] is not None]
    return crate_mae.load(out), losses[-1], int(rows[-1]["step"] or 0) * given["batch_size"]


class Contrastive(nn.Module):
    """A backbone and the projection head that is thrown away."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, SimCLRProjectionHead(width, 512, 128)

    def forward(self, images: Tensor) -> Tensor:
        """The projection of each image."""
        return self.head(self.backbone(images).flatten(1))


def by_simclr(
    method: str, seed: int, lr: float, minutes: float, options: argparse.Namespace
) -> tuple[nn.Module, float, int]:
    """A backbone by SimCLR; its loss over the last tenth of the steps, and the images seen."""
    torch.manual_seed(seed)
    backbone = fresh(method)
    model = Contrastive(Pooled(backbone), 512 if "ResNet" in method else backbone.num_features).train()
    images = ImageFolder(str(options.train), transform=SimCLRTransform(input_size=SIZE, gaussian_blur=0.0))
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.95))
    criterion, losses, start = NTXentLoss(temperature=0.5), [], time.perf_counter()
    while (spent := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for (one, other), _ in loader:
            spent = (time.perf_counter() - start) / (60 * minutes)
            if spent >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(round(1e6 * spent), 10**6, 50_000, lr, 0.0)
            with torch.autocast("cpu", torch.bfloat16):
                projected = model(torch.cat([one, other]))
            loss = criterion(*projected.float().chunk(2))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    if not all(map(math.isfinite, losses)):
        return backbone, math.inf, len(losses) * BATCH
    return backbone, float(np.mean(losses[-math.ceil(len(losses) / 10) :])), len(losses) * BATCH


class Pooled(nn.Module):
    """Features of a backbone: pooled by a ResNet, the mean of the patches of a ViT."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """One vector for each image."""
        tokens = self.backbone.forward_features(images)
        if tokens.ndim == 4:
            return tokens.mean((2, 3))
        return tokens[:, self.backbone.num_prefix_tokens :].mean(1)


def probes(model: nn.Module, train: Path, val: Path) -> Row:
    """Linear and k-NN accuracy of the layer that is best on a tenth of the training images."""
    (fitted, labels), (asked, true) = (features_of(model, folder) for folder in (train, val))
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
    }


def features_of(model: nn.Module, folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of images by layer, and their labels."""
    source = open_source(str(folder))
    assert source.labels is not None, "there is a folder for each class"
    if isinstance(model, crate_mae.MaskedAutoencoder) or hasattr(model, "patch_embed"):
        how = Extraction(layers="all", pooling="cls+mean", workers=0, cache=False)
        return [layer.values for layer in extract(open_backbone(model), source, how)], source.labels
    transform = transform_of(preset(CRATE))
    pooled = Pooled(model).eval()
    with torch.no_grad():
        read = [transform(source.read(i)) for i in range(len(source))]
        return [torch.cat([pooled(batch) for batch in torch.stack(read).split(256)]).numpy()], source.labels


if __name__ == "__main__":
    main()
