"""One training step that can be timed, counted and weighed: on random images in memory, by the loop's own parts."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from crate_mae.models.autoencoder import build
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import random_mask
from crate_mae.models.monotone import retract_
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.precision import autocast


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs to know beside its model.

    Attributes:
        batch_size: images.
        mask_ratio: share of hidden patches.
        weight_decay: of AdamW.
        clip_grad: largest norm of the gradient.
        precision: float32 or bfloat16.
    """

    batch_size: int
    mask_ratio: float
    weight_decay: float
    clip_grad: float
    precision: str

    def replace(self, **settings: Any) -> "StepSettings":
        """A copy with other settings."""
        return dataclasses.replace(self, **settings)


class TrialStep:
    """Forward, backward, clipping and AdamW, on a model of its own with random images.

    Neither the global generator nor anything outside is changed.

    Args:
        config: of the model.
        settings: of the step.
        device: where to compute.
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
        """Take a step; its seconds."""
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
        """Floating-point operations of the matrix products of a step, forward and backward."""
        with flop_counter() as counter:
            self.loss().backward()
            retract_(self.model)
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    def forward_flops(self) -> int:
        """The same of the forward pass alone."""
        with torch.no_grad(), flop_counter() as counter:
            self.loss()
        return counter.get_total_flops()

    def masked_encoder_flops(self) -> int:
        """The same of the encoder's part in that: with patches hidden, as in training."""
        so_far = []
        with torch.no_grad(), flop_counter() as counter:
            # The encoder's last norm is where it ends, whichever of its ways the model takes.
            end = self.model.encoder.norm.register_forward_hook(lambda *_: so_far.append(counter.get_total_flops()))
            self.loss()
            end.remove()
        return so_far[0]

    def encoder_flops(self) -> int:
        """The same of the encoder alone, forward, for the whole batch with nothing hidden."""
        self.model.eval()
        with torch.inference_mode(), flop_counter() as counter:
            self.model.encoder.forward_features(self.images)
        self.model.train()
        return counter.get_total_flops()

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        with autocast(self.device, self.settings.precision):
            return self.model(self.images, mask=self.mask).loss


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of the operations of matrix products and convolutions; a multiplication with addition is 2.

    It overlooks `baddbmm_`, which `theory.attention.SymmetricAttention` uses backward, and the fused attention of CPUs:
    two products forward; backward five, since it forms the weights again. So those are added.
    """
    aten = torch.ops.aten
    overlooked = {
        aten.baddbmm_: _baddbmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=overlooked)


def _baddbmm_flops(_sum: Any, a: Any, b: Any, *_rest: Any, **_options: Any) -> int:
    """2 b n k m for a (b n k) times b (b k m); the counter gives shapes."""
    batch, n, k = a
    return 2 * batch * n * k * b[-1]


def _attention_flops(query: Any, key: Any, value: Any, *_rest: Any, **_options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_rest: Any, **_options: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
