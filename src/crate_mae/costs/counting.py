"""What a training step asks for, counted operation by operation and tensor by tensor.

Counts are exactly affine in the number of images, and in the number of layers of either side, since these are alike. So
they are taken for few of each, which is quick for any model, and continued.
"""

from collections.abc import Callable

import torch

from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.models.config import ModelConfig
from crate_mae.training.memory import kept_bytes

_CPU = torch.device("cpu")


def training_flops(config: ModelConfig, settings: StepSettings) -> int:
    """Operations of the matrix products of a step, forward and backward; see `trial.flop_counter`."""
    return _continued(lambda model, images: _trial(model, settings, images).training_flops(), config, settings)


def forward_flops(config: ModelConfig, settings: StepSettings) -> int:
    """The same of the forward pass alone."""
    return _continued(lambda model, images: _trial(model, settings, images).forward_flops(), config, settings)


def masked_encoder_flops(config: ModelConfig, settings: StepSettings) -> int:
    """The same of the encoder's part in the forward pass: with patches hidden, as in training."""
    return _continued(lambda model, images: _trial(model, settings, images).masked_encoder_flops(), config, settings)


def activation_bytes(config: ModelConfig, settings: StepSettings) -> int:
    """Memory that the forward pass keeps for the backward pass, beside the parameters; shared memory counts once."""
    return _continued(lambda model, images: saved_bytes(_trial(model, settings, images)), config, settings)


def saved_bytes(step: TrialStep) -> int:
    """What autograd keeps until the backward pass of this very step."""
    return kept_bytes(step.loss, step.model.parameters())


def _trial(config: ModelConfig, settings: StepSettings, images: int) -> TrialStep:
    return TrialStep(config, settings.replace(batch_size=images), _CPU)


def _continued(count: Callable[[ModelConfig, int], int], config: ModelConfig, settings: StepSettings) -> int:
    """A count of the whole model and batch from those of one and two layers, two and three images."""

    def of_layers(images: int) -> int:
        least, encoder, decoder = (
            count(config.replace(depth=depth, decoder_depth=decoder_depth), images)
            for depth, decoder_depth in ((1, 1), (2, 1), (1, 2))
        )
        return least + (config.depth - 1) * (encoder - least) + (config.decoder_depth - 1) * (decoder - least)

    # Not from one image: there PyTorch shares a little memory that two images do not share.
    two = of_layers(2)
    return two + (settings.batch_size - 2) * (of_layers(3) - two)
