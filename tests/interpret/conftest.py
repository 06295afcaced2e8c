"""Small models of both kinds, and images."""

import pytest
import torch

import crate_mae

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 2, "in_chans": 1}


@pytest.fixture
def build():
    """`build(name, **settings)`: a small model with the same fresh weights at every call, in `eval()`."""

    def make(name="crate_mae_nano_patch2_8", **settings):
        torch.manual_seed(0)
        return crate_mae.create_model(name, **(SMALL | settings)).eval()

    return make


@pytest.fixture
def images():
    return torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
