"""Mixup and CutMix: a function of (seed, step), however the step's images are divided."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from crate_mae.data.dataset import global_generators_seeded
from crate_mae.training.randomness import Purpose, derive_seed


class Mixing:
    """timm's Mixup and CutMix of neighbours: image 2i of the global batch with image 2i + 1, all with the same share.

    timm mixes the first image of a batch with the last, the second with the last but one, and so on, which depends on
    where a batch is cut into micro-batches. Neighbours stay together as long as every micro-batch has an even number of
    images. The share, and for CutMix the box, is drawn once a step.

    Args:
        mixup: parameter of the Beta distribution from which Mixup's share is drawn; 0 does without.
        cutmix: that of CutMix; of both, each step uses one or the other.
        label_smoothing: part of each target that is spread over all classes.
        num_classes: k.
        seed: of the run.
    """

    def __init__(self, mixup: float, cutmix: float, *, label_smoothing: float, num_classes: int, seed: int) -> None:
        self.mixes = mixup > 0 or cutmix > 0
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.seed = seed
        self._mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def __call__(
        self, step: int, images: Float[Tensor, "b c hh ww"], labels: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c hh ww"], Float[Tensor, "b k"]]:
        """Mixed images in another order, and how much of each class is in each."""
        if not self.mixes:
            return images, mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        count = len(images)
        even = torch.arange(0, count, 2, device=images.device)
        order = torch.cat([even, even.flip(0) + 1])  # 0 2 4 5 3 1: timm then mixes 0 with 1, 2 with 3, 4 with 5
        with global_generators_seeded(derive_seed(self.seed, Purpose.MIX, step) % 2**32):
            return self._mixup(images[order], labels[order])
