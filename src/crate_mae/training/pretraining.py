"""The task of pretraining: complete masked images, and measure the model on held-out ones."""

from __future__ import annotations

import fnmatch
import math
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import AdamW

from crate_mae.data import ImageSource, Part, pretrain_transform, save_picture_grid
from crate_mae.data.base import (
    aligned_labels,
    evenly_spaced,
    fixed_sample,
    occurring_classes,
    read_all,
    refuse_unreadable,
)
from crate_mae.data.transforms import Preparation
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder, build, masked_loss
from crate_mae.models.completion import complete, flat_patches
from crate_mae.models.config import NEIGHBOURS, ModelConfig
from crate_mae.models.devices import send
from crate_mae.models.features import mean_cosine, neighbour_votes, pool, transform_of
from crate_mae.models.masking import hide_all_but, random_mask, visible_from_noise
from crate_mae.models.tracing import trace
from crate_mae.models.transfer import start_from
from crate_mae.options import origin
from crate_mae.theory.coding_rate import official_subspace_coding_rate
from crate_mae.theory.measures import effective_rank, zero_fraction
from crate_mae.training.images import RunImages
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.options import OF_ONE_LENGTH, PretrainOptions, given_words
from crate_mae.training.randomness import step_noise
from crate_mae.training.task import StepLoss, Task, measuring

_SPARSE_CODES = "encoder.blocks.*.ista"
_PROJECTIONS = "encoder.blocks.*.attn.subspaces"
_MASK_SEED = 0  # the same masks in every run, so that runs can be compared
_BATCH = 32
_PICTURED = 8
_MOST_LABELLED, _FEWEST_LABELLED = 2000, 50
_MOST_BYTES = 2**28  # of their pixels
_FEW, _LEAST_SIDE = 10_000, 32  # images, and pixels of each, from which the bundled model has been better to start from
_BUNDLED, _SMALL = "crate_mae_micro_monotone_cifar10", 64  # a model to start from, and pixels to have many steps
_ADVICE = "with few images, --recipe few_images has given features as good or better"  # results/own_images
_OF_ONE_MODEL = ("recipe", "model", "model_settings", "image_size", "mask_tokens", "norm_pix_loss", "lr")


@final
class Pretraining(Task[PretrainOptions]):
    """Learns to complete images with most patches hidden; measured on a few held-out images.

    It starts from `weights` of another model, or with None from a random initialisation.

    Raises:
        UserError: if the held-out images cannot be read.
    """

    measures: ClassVar[tuple[str, ...]] = ("held_out_loss", "feature_rank", "feature_cosine", "knn_accuracy")

    def __init__(
        self,
        config: PretrainOptions,
        images: RunImages,
        model: ModelConfig,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        fixed = transform_of(model)
        held_out, self.bad_held_out = read_all(images.held_out, range(len(images.held_out)), fixed)
        refuse_unreadable(images.held_out, self.bad_held_out, config.max_bad, measured="held-out images")
        super().__init__(config, images, build(model))
        try:
            self.start = None if weights is None else start_from(self.model, weights)
        except UserError as error:
            raise UserError(f"--init-from {config.init_from}: {error}") from error
        self.monitor = Monitor(torch.stack(list(held_out.values())), self.model.num_patches, config.mask_ratio)
        self.flat_loss = self.monitor.flat_loss(self.model)
        numbers = _measured_images(config, model, len(images.train))
        self.probe = OnlineProbe.of(images, list(held_out), fixed, numbers)

    def transform(self) -> Preparation:
        """Random crops and flips."""
        return augmentation(self.config, self.model.config)

    def optimizer(self, model: Any) -> AdamW:
        """AdamW with the betas for masked training."""
        return build_optimizer(model, self.config.weight_decay)

    def step_loss(self, step: int) -> StepLoss:
        """The mean error in the patches that this step hides."""
        c = self.config
        noise = step_noise(c.seed, step, c.batch_size, self.model.num_patches)

        def loss(
            model: nn.Module, images: Float[Tensor, "b c hh ww"], _labels: Int[Tensor, "b"], part: slice
        ) -> Float[Tensor, ""]:
            visible = send(visible_from_noise(noise[part], c.mask_ratio), images.device)
            return model(images, mask=hide_all_but(visible, noise.shape[1]), visible=visible).loss

        return loss

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Measure loss and features; signals of the layers and completed pictures go into the folder.

        Two measures show a collapse: the effective rank of the features less their mean over images falls towards 1,
        and the mean cosine between images rises towards 1.
        """
        loss, features, layers = self.monitor.measure(model)
        values = {
            "held_out_loss": loss,
            "feature_rank": float(effective_rank(features - features.mean(dim=0))),
            "feature_cosine": mean_cosine(features),
        }
        if self.probe is not None:
            values["knn_accuracy"] = self.probe.accuracy(model, features)
        self.directory.layers.append([{"step": step, **row} for row in layers])
        self.monitor.picture(model, self.directory.picture(step))
        return values

    def describe(self) -> dict[str, str]:
        """Images, model and input."""
        c, model, images = self.config, self.model, self.images
        source = f"split off {c.data}" if c.val is None else f"from {c.val}"
        (height, width), patch = model.config.image_size, model.config.patch_size
        rows = {
            "images": f"{len(images.train):,} of {c.data}; {len(images.held_out):,} held out, {source}",
            "model": f"{c.model}, {self.num_parameters / 1e6:.2f} M parameters",
            "input": f"{height} x {width} pixels{origin(c, 'image_size')}, {plural(c.channels, 'channel')}, "
            f"{model.num_patches} patches of {patch} x {patch}, {c.mask_ratio:.0%} hidden",
        }
        if self.start is not None:
            rows["starts from"] = f"{c.init_from}: {self.start}"
        elif c.init_from is None and len(images.train) < _FEW and min(height, width) >= _LEAST_SIDE:
            rows["starts from"] = f"random initialisation; {_ADVICE}"
        if self.probe is not None:
            rows["labels"] = f"not trained on, but measured: {self.probe}"
        return rows

    def describe_result(self, rows: Sequence[Mapping[str, float | None]]) -> str:
        """Describe the loss and the k-NN accuracy of held-out images, first and last."""
        losses = [loss for row in rows if (loss := row["held_out_loss"]) is not None]
        relation = "below" if losses[-1] < self.flat_loss else "NOT below"
        text = (
            f"Loss on held-out images: {losses[0]:.4f} before training, {losses[-1]:.4f} now, "
            f"{relation} {self.flat_loss:.4f} for flat patches."
        )
        if scores := [score for row in rows if math.isfinite(score := row.get("knn_accuracy") or math.nan)]:
            text += f" k-NN accuracy on them: {scores[0]:.1%} before training, {scores[-1]:.1%} now"
            text += "." if scores[-1] > scores[0] else ", NOT above: for these labels, training has not helped."
        return text

    def shorter_commands(self) -> list[str]:
        """Commands for a run of half an hour: of the same model, and of a small one that has been trained before."""
        c, run = self.config, self.directory.path
        if c.is_from_python:
            return []

        def command(out: str, without: Collection[str], *words: str) -> str:
            given = [*given_words(c, {"data", *without}), *words]
            return shlex.join(["crate-mae", "pretrain", c.data, "--out", out, "--minutes", "30", *given])

        plain = command(f"{run}-30min", OF_ONE_LENGTH)
        if c.init_from:
            return [plain]
        size = ["--image-size", str(_SMALL)] if min(self.model.config.image_size) > _SMALL else []
        start = ["--init-from", _BUNDLED, *size]
        return [plain, command(f"{run}-30min-init", {*OF_ONE_LENGTH, *_OF_ONE_MODEL}, *start)]

    def describe_use(self) -> list[str]:
        """Describe how to complete other images."""
        run = self.directory.path
        images = "IMAGES" if self.config.is_from_python else shlex.quote(self.config.data)
        return [
            f"Curves, pictures: {self.directory.report}",
            f"Complete images:  crate-mae reconstruct {shlex.quote(str(run))} {images} --out picture.png",
            f'From Python:      model = crate_mae.load("{run.as_posix()}")',
        ]


def augmentation(config: PretrainOptions, model: ModelConfig) -> Preparation:
    """Random crops and flips, as a run prepares its training images."""
    c, m = config, model
    return pretrain_transform(m.image_size, m.in_chans, m.mean, m.std, c.min_crop, c.flip)


class Monitor:
    """Measures a model on fixed held-out images, normalised, with fixed masks: nothing random, no state."""

    def __init__(self, images: Float[Tensor, "b c hh ww"], num_patches: int, mask_ratio: float) -> None:
        self.images = images
        generator = torch.Generator().manual_seed(_MASK_SEED)
        self.masks: Bool[Tensor, "b n"] = random_mask(len(images), num_patches, mask_ratio, generator)

    def measure(self, model: MaskedAutoencoder) -> tuple[float, Float[Tensor, "b d"], list[dict[str, Any]]]:
        """Measure loss, features and layers, in float32.

        Returns:
            the training loss; features of the images: the mean over patches of the unmasked encoder's output; and rows
            of layers.csv, of every encoder layer that has them: `zero_fraction`, the share of exact zeros in the sparse
            code, and `subspace_rate`, the coding rate of the projections, mean over images, as the official code takes
            it. Layers count from 0.
        """
        names = [name for name, _ in model.named_modules()]
        patterns = [pattern for pattern in (_SPARSE_CODES, _PROJECTIONS) if fnmatch.filter(names, pattern)]
        device = model.mask_token.device
        loss, features = 0.0, []
        sums: dict[tuple[str, str], float] = defaultdict(float)
        with measuring(model):
            for images, masks in zip(self.images.split(_BATCH), self.masks.split(_BATCH), strict=True):
                images = images.to(device)
                share = len(images) / len(self.images)
                loss += share * float(model(images, mask=masks).loss)
                with trace(model, patterns) as record:
                    tokens = model.encoder.forward_features(images)
                features.append(_pooled(model, tokens))
                for name, (output,) in record.items():
                    measure, value = _layer_measure(name, output, model.config.num_heads)
                    sums[name, measure] += share * value
        layers = []
        for (name, measure), value in sums.items():
            part, _, layer, *_ = name.split(".")  # such as encoder.blocks.3.ista
            layers.append({"part": part, "layer": int(layer), "measure": measure, "value": value})
        return loss, torch.cat(features), layers

    def flat_loss(self, model: MaskedAutoencoder) -> float:
        """The loss of `flat_patches`, which needs no network."""
        loss = 0.0
        for images, masks in zip(self.images.split(_BATCH), self.masks.split(_BATCH), strict=True):
            flat = flat_patches(model, images, masks)
            prediction = torch.zeros_like(flat) if model.config.norm_pix_loss else flat
            loss += len(images) / len(self.images) * float(masked_loss(model.config, images, prediction, masks))
        return loss

    def picture(self, model: MaskedAutoencoder, path: Path) -> None:
        """Write held-out images: original, masked, prediction of hidden patches, completed."""
        device = model.mask_token.device
        chosen = evenly_spaced(len(self.images), _PICTURED)
        images, masks = self.images[chosen].to(device), self.masks[chosen]
        with measuring(model):
            completion = complete(model, images, masks)
        save_picture_grid([(name, pictures.cpu()) for name, pictures in completion._asdict().items()], path)


class OnlineProbe:
    """Finds the classes of held-out images by those of labelled training images with the most similar features.

    The labels are only measured, never trained on. Features are the monitor's, and the vote is that of `crate-mae eval
    knn`, with fewer images: a curve to compare with itself, not a number to publish. Images are read at the first
    measurement, and kept.

    Args:
        train: labelled training images, whose features vote.
        held_out: the images that the monitor measures; not all need labels.
        transform: prepares an image without randomness.
    """

    def __init__(self, train: ImageSource, held_out: ImageSource, transform: Preparation) -> None:
        self.classes = sorted(set(occurring_classes(train)))
        self.neighbours = NEIGHBOURS if len(train) >= 20 * NEIGHBOURS else max(1, len(train) // 20)
        self._train, self._transform = train, transform
        self._labels = torch.from_numpy(aligned_labels(train, self.classes))
        self._held_out = torch.from_numpy(aligned_labels(held_out, self.classes))
        self._images: Float[Tensor, "n c hh ww"] | None = None

    @classmethod
    def of(cls, images: RunImages, readable: Sequence[int], transform: Preparation, size: int) -> OnlineProbe | None:
        """The probe with so many training images, if there is anything to measure.

        Returns:
            None without labels, with too few images, with a single class, or if no held-out image is of these classes.
        """
        labels = images.train.labels
        if labels is None or images.held_out.labels is None or size < _FEWEST_LABELLED:
            return None
        chosen = [i for i in fixed_sample(len(labels), size) if labels[i] >= 0]
        train = Part(images.train, np.array(chosen, dtype=np.int64))
        probe = cls(train, Part(images.held_out, np.array(readable)), transform)
        return probe if len(probe.classes) > 1 and bool((probe._held_out >= 0).any()) else None

    def __str__(self) -> str:
        known = int((self._held_out >= 0).sum())
        return (
            f"k-NN accuracy of {known:,} held-out among {len(self._labels):,} training images of "
            f"{len(self.classes)} classes"
        )

    def accuracy(self, model: MaskedAutoencoder, held_out: Float[Tensor, "b d"]) -> float:
        """The share of held-out images, of these features, whose class wins the vote of their nearest neighbours."""
        if self._images is None:  # in half precision; unreadable ones are left out
            read, _ = read_all(self._train, range(len(self._train)), lambda image: self._transform(image).half())
            if not read:
                return math.nan
            self._images, self._labels = torch.stack(list(read.values())), self._labels[list(read)]
        with measuring(model):
            batches = (batch.to(held_out.device, torch.float32) for batch in self._images.split(_BATCH))
            train = torch.cat([_pooled(model, model.encoder.forward_features(batch)) for batch in batches])
        mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
        train, val = ((z - mean) / torch.where(std > 0, std, 1) for z in (train, held_out))
        votes = neighbour_votes(train, self._labels, val, len(self.classes), min(self.neighbours, len(train)))
        return float((votes.argmax(dim=1).cpu() == self._held_out)[self._held_out >= 0].float().mean())


def _measured_images(config: PretrainOptions, model: ModelConfig, train: int) -> int:
    """How many training images to probe with: as many as cost less than 2% of the time between measurements.

    That is one for each 32 images of the steps in between. Measured on CIFAR-10 on one core with one for each 25: 0.6%
    for crate_mae_micro_patch4_32, 1.0% for vit_mae_micro_patch4_32, 2.2% for crate_mae_micro_visible_patch4_32, whose
    steps encode a quarter of the patches.
    """
    bytes_each = 2 * model.in_chans * math.prod(model.image_size)
    return min(_MOST_LABELLED, train, config.monitor_steps * config.batch_size // 32, _MOST_BYTES // bytes_each)


def _pooled(model: MaskedAutoencoder, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    return pool(tokens, model.encoder.num_prefix_tokens, "mean")


def _layer_measure(name: str, output: Tensor, num_heads: int) -> tuple[str, float]:
    if fnmatch.fnmatch(name, _SPARSE_CODES):
        return "zero_fraction", float(zero_fraction(output))
    projections = output.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return "subspace_rate", float(official_subspace_coding_rate(projections).mean())
