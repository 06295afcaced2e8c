"""Information through depth, held to networks in which it is known."""

import numpy as np
import pytest
import torch
from torch import nn

from crate_mae.data import open_source
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.interpret.information import (
    dead_coordinates,
    feature_ranks,
    pixels_from_layers,
    probe_images,
    probe_layers,
)
from crate_mae.interpret.statistics import find
from crate_mae.models.masking import patchify
from crate_mae.models.tracing import trace


class Keeper(nn.Module):
    """Two layers: the first keeps every pixel, turned and moved, and the second half of the patches' variance."""

    def __init__(self):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with torch.no_grad():
            self.blocks[0].weight.copy_(turn)
            self.blocks[1].weight.copy_(torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4)) @ turn.mT)

    def forward_features(self, images):
        patches = patchify(images, 2)
        return self.blocks(torch.cat([torch.zeros(len(images), 1, 8), patches], dim=1))


def two_channels(count):
    return torch.randn(count, 2, 4, 6, generator=torch.Generator().manual_seed(1))


def test_pixels_are_found_where_they_are_kept():
    rows = pixels_from_layers(Keeper(), two_channels(200), 2)
    assert [row.n for row in rows] == [100, 100]
    assert rows[0].mean == pytest.approx(1, abs=1e-3)
    assert rows[1].mean == pytest.approx(0.5, abs=0.03)  # four of eight equal coordinates
    assert 0 < rows[1].spread < 0.3


def test_what_is_fitted_is_not_what_is_judged(build):
    """Noise tells nothing of the next image, although 8 coordinates fit a third of the variance of 24 patches."""
    images = two_channels(8)
    forget = Keeper()
    # The same image has the same tokens, from which nobody can tell its pixels.
    forget.forward_features = lambda x: forget.blocks(torch.sin(1e4 * patchify(x, 2)))
    rows = pixels_from_layers(forget, images, 2)
    assert all(row.mean < 0.2 for row in rows)


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="at least 2"):
        pixels_from_layers(Keeper(), two_channels(1), 2)


def test_coordinates_are_dead_if_no_token_of_any_batch_uses_them(build, images):
    model = build()
    rows = dead_coordinates(model, images.split(2))
    with torch.no_grad(), trace(model, ["*.code"]) as record:
        model(images, mask=torch.zeros(len(images), model.num_patches, dtype=torch.bool))
    for row in rows:
        code = record[f"encoder.blocks.{row.layer}.code"][0]
        assert row.mean == pytest.approx(float((code.flatten(0, 1) == 0).all(0).float().mean()))
    assert len(rows) == 2
    model.encoder.blocks[1].ista.threshold = 1e6
    assert [row.mean for row in dead_coordinates(model, [images])] == [rows[0].mean, 1.0]
    assert dead_coordinates(build("vit_mae_nano_patch2_8"), [images]) == []


def test_feature_ranks_fall_to_one_where_images_become_one(build, images):
    model = build()
    rows = feature_ranks(model, images.split(3))
    assert [(row.part, row.layer) for row in rows] == [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    with torch.no_grad(), trace(model, ["encoder.blocks.1.z_next"]) as record:
        model(images, mask=torch.zeros(len(images), model.num_patches, dtype=torch.bool))
    z = record["encoder.blocks.1.z_next"][0].mean(1).double()
    share = torch.linalg.svdvals(z - z.mean(0))
    share = share / share.sum()
    expected = float(torch.special.entr(share).sum().exp())
    assert find(rows, "feature_rank", "z_next")[1].mean == pytest.approx(expected, rel=1e-3)
    model.encoder.blocks[1].ista.threshold = 1e6
    assert find(feature_ranks(model, [images]), "feature_rank", "z_next")[1].mean == 1


def test_probes_know_more_than_chance_and_need_labels(build):
    backbone = open_backbone(build())
    train, test = open_source("digits:train"), open_source("digits:test")
    probes = probe_layers(backbone, train, test, grid=[0.01])
    assert list(probes) == [0, 1]
    assert all(probe.top1.value > 0.5 for probe in probes.values())
    unlabelled = open_source([np.zeros((8, 8), dtype=np.uint8)] * 3)
    with pytest.raises(UserError, match="no labels"):
        probe_images(train, unlabelled, 5, 0)
