"""One training step that can be timed and counted: on random images in memory, with the parts of the training loop.

Numbers of operations are exactly affine in the number of images, and in the number of layers of the encoder and of the
decoder. So `step_flops` counts them for few of each, which is quick for any model, and extrapolates.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from crate_mae.models.autoencoder import build
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import random_mask
from crate_mae.models.monotone import retract_
from crate_mae.private_torch import ATTENTION_OF_PROCESSORS, ATTENTION_OF_PROCESSORS_BACKWARD
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.preflight import autocast

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs beside its model, as in `PretrainOptions`; the precision is float32 or bfloat16."""

    batch_size: int
    mask_ratio: float
    weight_decay: float
    clip_grad: float
    precision: str


class TrialStep:
    """Forward, backward, clipping and AdamW, on a model of its own with random images.

    Neither the global generator nor anything outside is changed.
    """

    def __init__(self, config: ModelConfig, settings: StepSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build(config).to(device).train()
            shape = (settings.batch_size, config.in_chans, *config.image_size)
            self.images = torch.randn(shape).to(device)
            self.mask = random_mask(settings.batch_size, self.model.num_patches, settings.mask_ratio)
        retract_(self.model)
        self.optimizer = build_optimizer(self.model, settings.weight_decay)

    def __call__(self) -> float:
        """Take a step, and return how many seconds it took."""
        started = time.perf_counter()
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        retract_(self.model)
        self.optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - started

    def training_flops(self) -> int:
        """Count floating-point operations of the matrix products of a step, forward and backward."""
        with flop_counter() as counter:
            self.loss().backward()
            retract_(self.model)
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    def forward_flops(self) -> tuple[int, int]:
        """Count operations of the forward pass with hidden patches, as in training: of the encoder, and of all."""
        counts = []
        with torch.no_grad(), flop_counter() as counter:
            # Every encoder ends with its norm, whether it encodes mask tokens or not.
            end = self.model.encoder.norm.register_forward_hook(lambda *_: counts.append(counter.get_total_flops()))
            self.loss()
            end.remove()
        return counts[0], counter.get_total_flops()

    def encoder_flops(self) -> int:
        """Count operations of the encoder on the whole batch without hidden patches."""
        self.model.eval()
        with torch.inference_mode(), flop_counter() as counter:
            self.model.encoder.forward_features(self.images)
        self.model.train()
        return counter.get_total_flops()

    def loss(self) -> torch.Tensor:
        """Compute the loss of the batch: the forward pass."""
        with autocast(self.device, self.settings.precision):
            return self.model(self.images, mask=self.mask).loss


def step_flops(config: ModelConfig, settings: StepSettings) -> tuple[int, int, int]:
    """Count the operations of a step, extrapolated from one and two layers, two and three images.

    Returns:
        operations of the matrix products: of the encoder in the forward pass, with hidden patches; of the whole
        forward pass; of the forward and the backward pass.
    """

    def count(images: int, depth: int, decoder_depth: int) -> np.ndarray:
        few_layers = config.replace(depth=depth, decoder_depth=decoder_depth)
        step = TrialStep(few_layers, dataclasses.replace(settings, batch_size=images), _CPU)
        return np.array([*step.forward_flops(), step.training_flops()], dtype=np.int64)

    def of_all_layers(images: int) -> np.ndarray:
        both, encoder, decoder = count(images, 1, 1), count(images, 2, 1), count(images, 1, 2)
        return both + (config.depth - 1) * (encoder - both) + (config.decoder_depth - 1) * (decoder - both)

    two = of_all_layers(2)
    encoder, forward, both = (two + (settings.batch_size - 2) * (of_all_layers(3) - two)).tolist()
    return encoder, forward, both


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter of operations of matrix products and convolutions; a multiply-add is 2.

    PyTorch does not count `baddbmm_`, which `theory.attention.SymmetricAttention` uses backward, and the fused
    attention of CPUs (two products forward; five backward, which computes the weights again). Both are added here.
    """
    not_counted = {  # functions of the arguments, in which tensors are replaced by their shapes
        torch.ops.aten.baddbmm_: lambda _sum, a, b, **_: 2 * math.prod(a) * b[-1],  # a (b n k) times b (b k m)
        ATTENTION_OF_PROCESSORS: lambda *args, **_: sdpa_flop_count(*args[:3]),  # query, key, value
        ATTENTION_OF_PROCESSORS_BACKWARD: lambda *args, **_: sdpa_backward_flop_count(*args[:4]),  # gradient first
    }
    return FlopCounterMode(display=False, custom_mapping=not_counted)
