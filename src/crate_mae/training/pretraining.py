"""The task of pretraining: complete masked images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import AdamW

from crate_mae.data import evaluation_transform, pretrain_transform
from crate_mae.data.transforms import Preparation
from crate_mae.models.autoencoder import build
from crate_mae.models.config import ModelConfig
from crate_mae.models.devices import send
from crate_mae.models.masking import hide_all_but, quietest_patches
from crate_mae.training.images import PYTHON_OBJECT, RunImages, read_held_out
from crate_mae.training.monitor import Monitor
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.options import PretrainOptions
from crate_mae.training.progress import count
from crate_mae.training.randomness import step_noise
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.task import Measured, StepLoss, Task


@final
class Pretraining(Task[PretrainOptions]):
    """Learns to complete images of which most patches are hidden; measured on a few held-out images.

    Args:
        config: of the run.
        images: to train on and to measure on.
        model: what to build.

    Raises:
        UserError: if the held-out images cannot be read.
    """

    measures: ClassVar[tuple[str, ...]] = ("held_out_loss", "feature_rank")

    def __init__(self, config: PretrainOptions, images: RunImages, model: ModelConfig) -> None:
        fixed = evaluation_transform(model.image_size, model.in_chans, model.mean, model.std)
        held_out, bad = read_held_out(images.held_out, fixed, config.max_bad)
        super().__init__(config, images, model=build(model), bad_held_out=bad)
        self.monitor = Monitor(held_out, self.model.num_patches, config.mask_ratio)

    def transform(self) -> Preparation:
        """Random crops and flips."""
        c, m = self.config, self.model.config
        return pretrain_transform(m.image_size, m.in_chans, m.mean, m.std, c.min_crop, c.flip)

    def optimizer(self, model: Any) -> AdamW:
        """AdamW with the betas of masked training."""
        return build_optimizer(model, self.config.weight_decay)

    def step_loss(self, step: int) -> StepLoss:
        """The mean error in the patches that this step hides."""
        c = self.config
        noise = step_noise(c.seed, step, c.batch_size, self.model.num_patches)

        def loss(
            model: nn.Module, images: Float[Tensor, "b c hh ww"], _labels: Int[Tensor, "b"], part: slice
        ) -> Float[Tensor, ""]:
            visible = send(quietest_patches(noise[part], c.mask_ratio), images.device)
            return model(images, mask=hide_all_but(visible, noise.shape[1]), visible=visible).loss

        return loss

    def measure(self, model: Any, step: int, directory: RunDirectory) -> Measured:
        """Loss and features; the signals of the layers and completed pictures go into the folder."""
        signals = self.monitor.measure(model)
        directory.layers.append([{"step": step, **signal._asdict()} for signal in signals.layers])
        self.monitor.picture(model, directory.picture(step))
        return Measured({"held_out_loss": signals.held_out_loss, "feature_rank": signals.feature_rank})

    def describe(self) -> dict[str, str]:
        """Images, model and input."""
        c, model, images = self.config, self.model, self.images
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        source = f"taken out of {c.data}" if c.val is None else f"from {c.val}"
        height, width = model.config.image_size
        return {
            "images": f"{len(images.train):,} of {c.data}; {len(images.held_out):,} held out, {source}",
            "model": f"{c.model}, {parameters / 1e6:.2f} M parameters",
            "input": f"{height} x {width} pixels, {count(c.channels, 'channel')}, {model.num_patches} patches of "
            f"{model.config.patch_size} x {model.config.patch_size}, {c.mask_ratio:.0%} hidden",
        }

    def describe_end(self, rows: list[dict[str, float | None]], run: Path) -> list[str]:
        """The loss on held-out images, and how to complete others."""
        losses = [row["held_out_loss"] for row in rows if row["held_out_loss"] is not None]
        images = "IMAGES" if self.config.data.startswith(PYTHON_OBJECT) else shlex.quote(self.config.data)
        return [
            f"Loss on held-out images: {losses[0]:.4f} before training, {losses[-1]:.4f} now.",
            f"Curves, pictures: {RunDirectory(run).report}",
            f"Complete others:  crate-mae reconstruct {shlex.quote(str(run))} {images} --out picture.png",
            f'From Python:      model = crate_mae.load("{run.as_posix()}")',
        ]
