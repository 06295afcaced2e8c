"""What is continued from few layers and images is what the whole model and batch ask for."""

import pytest
import torch

from crate_mae.costs.counting import (
    activation_bytes,
    forward_flops,
    masked_encoder_flops,
    saved_bytes,
    training_flops,
)
from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.models import create_model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "crate_mae_nano_patch2_8",
        "crate_mae_nano_visible_patch2_8",
        "crate_mae_nano_monotone_patch2_8",
        "vit_mae_nano_patch2_8",
    ],
)
def test_counts_are_continued_exactly(name, precision):
    config = create_model(name, in_chans=1, embed_dim=20, num_heads=5, depth=3, decoder_depth=4).config
    settings = StepSettings(batch_size=5, mask_ratio=0.75, weight_decay=0.0, clip_grad=1.0, precision=precision)
    whole = TrialStep(config, settings, torch.device("cpu"))
    assert training_flops(config, settings) == whole.training_flops()
    assert forward_flops(config, settings) == whole.forward_flops()
    assert masked_encoder_flops(config, settings) == whole.masked_encoder_flops()
    assert activation_bytes(config, settings) == saved_bytes(whole)
