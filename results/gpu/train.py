"""Equal seconds of training on CIFAR-10: monotone and published layers, and the ViT of the size of the former.

    python results/gpu/train.py TRAIN TEST OUT --seconds 300

The images are in the memory of the device, as 8 bits; they are mirrored at random and normalised there. A step does
not wait for its loss, which is read one step later. All models have the same seconds: the same learning rates are
searched, each for `SEARCHED` of them, and the one with the lowest loss on held-out training images has the rest. Linear
probe and k-NN of every layer, before and after training, are fitted by other processes of the same machine meanwhile,
as many as fit into the seconds. OUT gets scores.json, rewritten with every result, and curves.csv.
"""

import argparse
import csv
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from crate_mae.data import open_source
from crate_mae.data.base import fixed_sample, read_all, refuse_unreadable
from crate_mae.data.decode import to_channels, to_tensor
from crate_mae.data.files import write_whole
from crate_mae.evaluation.probes import knn_accuracy_on_tenth, knn_probe, linear_probe
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import MASK_RATIO, ModelConfig
from crate_mae.models.devices import fastest_device
from crate_mae.models.features import depth, encode_layers, evaluating
from crate_mae.models.masking import random_mask, visible_from_noise
from crate_mae.models.monotone import retract_
from crate_mae.models.presets import create_model
from crate_mae.training.optimizer import build_optimizer, warmup_cosine
from crate_mae.training.preflight import autocast, peak_on, restart_peak
from crate_mae.training.run_directory import environment
from crate_mae.training.task import measuring

MODELS = {
    "monotone": "crate_mae_micro_wide_monotone_patch4_32",
    "published": "crate_mae_micro_wide_patch4_32",
    "ViT": "vit_mae_micro_wide_monotone_matched_patch4_32",
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of AdamW, alike for all
SEARCHED = 0.05  # of a model's seconds, for each rate
PROBING = 0.2  # of all seconds, for the probes that are left when the last model is trained
TRAINING = 0.9  # of what is left before; the rest is for held-out losses and features
WARM_UP, WEIGHT_DECAY, CLIP = 0.05, 0.05, 1.0
HELD_OUT = 2000
AT_ONCE = 1000  # images that are measured together
SEED = 0
PARTS = 10**6  # into which the schedule divides the time

logger = logging.getLogger("train")
Row = dict[str, Any]


class Images(NamedTuple):
    """What is trained and measured on; pixels are on the device.

    Attributes:
        train: trained on, and what the probes are fitted on.
        labels: of these.
        held_out: the loss is measured on these training images.
        test: what the probes are asked.
        test_labels: of these.
    """

    train: UInt8[Tensor, "b c hh ww"]
    labels: Int[np.ndarray, "b"]
    held_out: UInt8[Tensor, "k c hh ww"]
    test: UInt8[Tensor, "m c hh ww"]
    test_labels: Int[np.ndarray, "m"]


def main() -> None:
    """Train and probe all models, as far as the time allows."""
    began = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports take seconds, too
    options = _parser().parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(relativeCreated)d ms %(message)s", force=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that fit probes
    device = torch.device("cpu") if options.cpu else fastest_device()
    images = opened(options, device)
    report = Report(options, device, images)
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(workers) as pool:
        probes = Probes(pool, Path(folder), images)
        for name in MODELS:
            probes.ask(name, "random initialisation", fresh(name, device))
        left = began + options.seconds * (1 - PROBING) - time.monotonic()
        for name in MODELS:
            model = trained(name, TRAINING * left / len(MODELS), images, device, options, report)
            probes.ask(name, "trained", model)
            report.add_probes(probes)
        report.add_probes(probes, until=began + options.seconds)
    logger.info("finished; probes without a result: %s", report.unfinished or "none")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything, from the start of the process")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--images", type=int, help="training images, the held-out ones included; all by default")
    parser.add_argument("--test-images", type=int, help="all by default")
    parser.add_argument("--cpu", action="store_true", help="to try the script where there is a GPU")
    return parser


def opened(options: argparse.Namespace, device: torch.device) -> Images:
    """All images, read before the clock of any model starts."""
    pixels, labels = read(options.train, options.images)
    test, test_labels = read(options.test, options.test_images)
    held_out = min(HELD_OUT, len(pixels) // 10)
    logger.info("%d training, %d held-out and %d test images", len(pixels) - held_out, held_out, len(test))
    on_device = (x.to(device) for x in (pixels[held_out:], pixels[:held_out], test))
    train, kept, asked = on_device
    return Images(train, labels[held_out:], kept, asked, test_labels)


def read(path: str, most: int | None) -> tuple[UInt8[Tensor, "b c hh ww"], Int[np.ndarray, "b"]]:
    """Images as 8 bits, and their labels."""
    source = open_source(path)
    assert source.labels is not None, f"{path} has no labels"
    found, bad = read_all(source, fixed_sample(len(source), most), lambda image: to_tensor(to_channels(image, 3)))
    refuse_unreadable(source, bad, 0.0)
    return torch.stack(list(found.values())), source.labels[list(found)]


def fresh(name: str, device: torch.device) -> MaskedAutoencoder:
    """A model with random initialisation, the same at every call."""
    torch.manual_seed(SEED)
    return create_model(MODELS[name], norm_pix_loss=True).to(device)


def trained(
    name: str, seconds: float, images: Images, device: torch.device, options: argparse.Namespace, report: "Report"
) -> MaskedAutoencoder:
    """Search the learning rate, then train with it.

    A training before that, which is thrown away, loads what the first steps on a device load.
    """
    train(fresh(name, device), RATES[0], SEARCHED * seconds, images, options.batch)
    losses = {}
    for lr in RATES:
        model = fresh(name, device)
        train(model, lr, SEARCHED * seconds, images, options.batch)
        losses[lr] = held_out_loss(model, images.held_out)
    best = min(losses, key=losses.__getitem__)
    model = fresh(name, device)
    before = held_out_loss(model, images.held_out)
    restart_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    final = (1 - SEARCHED * (1 + len(RATES))) * seconds
    began = time.perf_counter()
    steps, curve = train(model, best, final, images, options.batch)
    took, seen = time.perf_counter() - began, steps * options.batch
    after = held_out_loss(model, images.held_out)
    row = {
        "model": name,
        "preset": MODELS[name],
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses_of_the_search": losses,
        "lr": best,
        "lr_is_at_the_edge": best in (RATES[0], RATES[-1]),
        "seconds": round(took, 2),
        "steps": steps,
        "epochs": round(seen / len(images.train), 2),
        "images_per_second": round(seen / took),
        "peak_memory": peak_on(device),
        "held_out_loss": {"before": before, "after": after},
    }
    report.curve += [{"model": name, **point} for point in curve]
    report.add("trainings", [row])
    return model


def train(
    model: MaskedAutoencoder, lr: float, seconds: float, images: Images, batch: int
) -> tuple[int, list[dict[str, float]]]:
    """Train for so many seconds; the number of steps, and the mean loss of each hundredth of the time.

    The learning rate follows the clock. Training ends early when a loss is not finite.
    """
    device = model.mask_token.device
    optimizer = build_optimizer(model.train(), WEIGHT_DECAY)
    retract_(model)
    batches = augmented(images.train, batch, torch.Generator(device).manual_seed(SEED))
    noise = torch.Generator(device).manual_seed(SEED + 1)
    normalise = normaliser(model.config, device)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    pending, steps, began = None, 0, time.perf_counter()
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(round(PARTS * spent), PARTS, round(PARTS * WARM_UP), lr, 0.0)
        loss = step(model, optimizer, normalise(next(batches)), noise)
        steps += 1
        if pending is not None:
            losses.append(arrived(*pending))
            if not math.isfinite(losses[-1]):
                logger.info("the loss is not finite after %d steps with learning rate %g", steps, lr)
                break
            if 100 * spent > len(curve) + 1:
                point = {"seconds": round(spent * seconds, 3), "images": steps * batch, "loss": float(np.mean(losses))}
                curve, losses = [*curve, point], []
        pending = sent(loss)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    logger.info("%s: %d steps with learning rate %g in %.1f s", model.config.name, steps, lr, seconds)
    return steps, curve


def step(
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    images: Float[Tensor, "b c hh ww"],
    noise: torch.Generator,
) -> Float[Tensor, ""]:
    """One step of the optimizer; its loss, which has not been waited for."""
    draw = torch.rand(len(images), model.num_patches, generator=noise, device=images.device)
    with autocast(images.device, "bfloat16"):
        loss = model(images, visible=visible_from_noise(draw, MASK_RATIO)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    retract_(model)
    optimizer.zero_grad()
    return loss.detach()


def sent(loss: Float[Tensor, ""]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The loss on its way to the CPU, and what says that it is there."""
    if loss.device.type != "cuda":
        return loss, None
    here = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event


def arrived(loss: Tensor, event: torch.cuda.Event | None) -> float:
    """The number, once it is there; steps that were started later go on."""
    if event is not None:
        event.synchronize()
    return loss.item()


def augmented(
    images: UInt8[Tensor, "b c hh ww"], batch: int, generator: torch.Generator
) -> Iterator[UInt8[Tensor, "k c hh ww"]]:
    """Batches without end: epoch after epoch in a new order, half of the images mirrored."""
    while True:
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for numbers in order[: len(order) // batch * batch].split(batch):
            chosen = images[numbers]
            flip = torch.rand(batch, 1, 1, 1, generator=generator, device=images.device) < 0.5
            yield torch.where(flip, chosen.flip(3), chosen)


def normaliser(config: ModelConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From 8 bits to what a model takes, in the order of memory that its first convolution likes on CUDA."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (config.mean, config.std))

    def normalise(images: UInt8[Tensor, "b c hh ww"]) -> Float[Tensor, "b c hh ww"]:
        return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    return normalise


def held_out_loss(model: MaskedAutoencoder, images: UInt8[Tensor, "b c hh ww"]) -> float:
    """The loss in float32, with the same masks for all models."""
    masks = random_mask(len(images), model.num_patches, MASK_RATIO, torch.Generator().manual_seed(SEED))
    normalise = normaliser(model.config, images.device)
    with measuring(model):
        parts = zip(images.split(AT_ONCE), masks.split(AT_ONCE), strict=True)
        losses = [len(x) * model(normalise(x), mask=mask).loss.item() for x, mask in parts]
    loss = sum(losses) / len(images)
    return loss if math.isfinite(loss) else math.inf


class Probes:
    """Linear probe and k-NN of every layer, each fitted by another process; features travel in files.

    Args:
        pool: of these processes.
        folder: for the files.
        images: fitted on and asked.
    """

    def __init__(self, pool: Any, folder: Path, images: Images) -> None:
        self.pool, self.folder, self.images = pool, folder, images
        self.waiting: dict[tuple[str, str, int], AsyncResult[Row]] = {}
        np.savez(folder / "labels.npz", train=images.labels, test=images.test_labels)

    def ask(self, name: str, state: str, model: MaskedAutoencoder) -> None:
        """Have every layer of a model probed."""
        layers = range(depth(model.encoder))
        parts = {part: features(model, pixels) for part, pixels in self._pixels().items()}
        for layer in layers:
            path = self.folder / f"{name}_{state}_{layer}.npz"
            np.savez(path, **{part: found[layer] for part, found in parts.items()})
            self.waiting[name, state, layer] = self.pool.apply_async(probed, (path, name, state, layer))

    def _pixels(self) -> dict[str, Tensor]:
        return {"train": self.images.train, "test": self.images.test}

    def ready(self, until: float = 0.0) -> list[Row]:
        """The results that are there, or will be by a time, and have not been returned before."""
        rows = []
        for key, result in list(self.waiting.items()):
            result.wait(max(0.0, until - time.monotonic()))
            if result.ready():
                rows.append(self.waiting.pop(key).get())
        return rows

    def unfinished(self) -> list[str]:
        """The probes without a result."""
        return [f"{name}, {state}, layer {layer}" for name, state, layer in self.waiting]


def features(model: MaskedAutoencoder, images: UInt8[Tensor, "b c hh ww"]) -> list[Float[np.ndarray, "b f"]]:
    """Class token and mean of the patches, of every layer."""
    layers, normalise = range(depth(model.encoder)), normaliser(model.config, images.device)
    with evaluating(model.encoder):
        batches = [
            [x.float().cpu().numpy() for x in encode_layers(model.encoder, normalise(part), layers)]
            for part in images.split(AT_ONCE)
        ]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def probed(path: Path, name: str, state: str, layer: int) -> Row:
    """The accuracies of one layer; on a tenth of the training images, by which a layer can be chosen, and on test."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with np.load(path) as found, np.load(path.parent / "labels.npz") as labels:
        given = found["train"], labels["train"], found["test"], labels["test"]
    linear, knn = linear_probe(*given), knn_probe(*given)
    row: Row = {"model": name, "weights": state, "layer": layer}
    row |= {"linear": linear.top1.value, "linear_interval": [linear.top1.low, linear.top1.high]}
    row |= {"linear_on_tenth": linear.chosen_on, "linear_warnings": linear.warnings(), "knn": knn.top1.value}
    row |= {"knn_interval": [knn.top1.low, knn.top1.high], "knn_on_tenth": knn_accuracy_on_tenth(*given[:2])}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


class Report:
    """What has been measured so far, in scores.json and curves.csv.

    Args:
        options: of the command.
        device: trained on.
        images: trained and measured on.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, images: Images) -> None:
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        counts = {"train": len(images.train), "held_out": len(images.held_out), "test": len(images.test)}
        self.found: Row = {"device": device.type, "environment": environment(), "images": counts, "seed": SEED}
        self.found |= {"seconds": options.seconds, "batch": options.batch, "rates": RATES, "searched": SEARCHED}
        self.curve: list[Row] = []
        self.unfinished: list[str] = []

    def add(self, what: str, rows: list[Row]) -> None:
        """Add rows to a table, and write everything."""
        self.found.setdefault(what, []).extend(rows)
        for row in rows:
            logger.info("%s", json.dumps(row))
        self.write()

    def add_probes(self, probes: Probes, until: float = 0.0) -> None:
        """Add the probes that are ready, or will be by a time, and the names of the others."""
        rows = probes.ready(until)
        self.unfinished = probes.unfinished()
        self.add("probes", rows)

    def write(self) -> None:
        """Write both files anew."""
        rows = sorted(self.found.get("probes", []), key=lambda row: (row["model"], row["weights"], row["layer"]))
        found = self.found | {"probes": rows, "unfinished": self.unfinished}
        write_whole(self.out / "scores.json", json.dumps(found, indent=1))
        with (self.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["model", "seconds", "images", "loss"])
            writer.writeheader()
            writer.writerows(self.curve)


if __name__ == "__main__":
    main()
