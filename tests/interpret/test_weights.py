"""Measures of weights are exact where the weights are known."""

import copy
import math

import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.interpret.layer_measures import stream
from crate_mae.interpret.statistics import find
from crate_mae.interpret.weights import inverse_measures, layer_pairs, measure_inverse_weights, measure_weights
from crate_mae.theory import orthonormal_bases


@pytest.fixture
def model(build):
    """Encoder layer 0 has orthonormal subspaces, orthogonal to each other, an output of -3 U, and D = 2 I."""
    model = build()
    layer = model.encoder.blocks[0]
    u = orthonormal_bases(3, 24, 8, torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        layer.attn.subspaces.weight.copy_(u.mT.flatten(0, 1))
        layer.attn.proj.weight.copy_(-3 * u.transpose(0, 1).flatten(1))
        layer.ista.dictionary.copy_(2 * torch.eye(24))
    return model


def test_weights_by_hand(model):
    rows = measure_weights(model)
    values = {row.measure: row.mean for row in rows if (row.part, row.layer) == ("encoder", 0)}
    assert values == pytest.approx(
        {
            "orthonormality_error": 0,
            "orthonormality_error_scaled": 0,
            "head_coherence": 0,
            "head_affinity": 0,
            "output_cosine": -1,
            "output_error": 0,
            "output_error_common": 0,
            "dictionary_isometry_error": 3,
            "dictionary_isometry_error_scaled": 0,
            "dictionary_coherence": 0,
            "ista_step": 0.4,
        },
        abs=1e-3,
    )
    (heads,) = [row for row in rows if (row.part, row.layer, row.measure) == ("encoder", 0, "output_cosine")]
    assert (heads.n, heads.over) == (3, "heads")
    fresh = find(rows, "head_affinity", part="decoder")
    assert [row.mean for row in fresh] == pytest.approx([8 / 24] * 2, abs=0.1)
    assert not find(rows, "ista_step", part="decoder") and find(rows, "dictionary_coherence", part="decoder")


def test_tied_outputs_have_nothing_to_compare_and_a_vit_has_no_weights_of_ours(build):
    assert not find(measure_weights(build(output_projection="tied")), "output_cosine")
    assert measure_weights(build("vit_mae_nano_patch2_8")) == []


def test_nan_weights_are_a_sentence(model):
    for parameter in (model.encoder.blocks[1].attn.subspaces.weight, model.encoder.blocks[1].ista.dictionary):
        broken = copy.deepcopy(parameter.data)
        parameter.data[0, 0] = math.nan
        with pytest.raises(UserError, match="Layer 1 of the encoder gives numbers that are not finite"):
            measure_weights(model)
        with pytest.raises(UserError, match="not finite"):
            measure_inverse_weights(model)
        parameter.data.copy_(broken)


def test_partners_are_found_from_the_outside_in(model, build):
    pairs = layer_pairs(model)
    assert list(pairs) == ["encoder.blocks.0", "encoder.blocks.1"]
    assert pairs["encoder.blocks.0"] is model.decoder.blocks[1]
    assert layer_pairs(build(depth=3)) == {}
    assert layer_pairs(build(decoder_embed_dim=48)) == {}


def test_a_decoder_with_the_encoders_weights_is_alike(model):
    partner = model.decoder.blocks[1]
    layer = model.encoder.blocks[0]
    with torch.no_grad():
        partner.dictionary.weight.copy_(-5 * layer.ista.dictionary)
        # The same subspaces in another order and other bases.
        skewed = layer.attn.bases()[[2, 0, 1]] @ torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
        partner.attn.subspaces.weight.copy_(skewed.mT.flatten(0, 1))
    rows = {row.measure: row.mean for row in measure_inverse_weights(model) if row.layer == 0}
    assert rows["inverse_dictionary_cosine"] == pytest.approx(-1, abs=1e-6)
    # D = 2 I: W = I + 0.1 (2 I - 4 I) = 0.8 I, and E = -10 I.
    assert rows["inverse_operator_cosine"] == pytest.approx(-1, abs=1e-6)
    assert abs(rows["inverse_operator_cosine_control"]) < 0.3
    assert rows["inverse_subspace_affinity"] == pytest.approx(1, abs=1e-4)
    assert abs(rows["inverse_dictionary_cosine_control"]) < 0.2
    assert rows["inverse_subspace_affinity_control"] < 0.6


class Undo(torch.nn.Module):
    """A layer that gives half of the tokens that it was told."""

    def __init__(self, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.answer = answer

    def forward(self, z):
        return 0.5 * self.answer


def test_a_partner_that_undoes_its_layer_is_seen(build, images):
    model = build(depth=1, decoder_depth=1)
    with torch.no_grad():
        tokens = model.encoder._pos_embed(model.encoder.patch_embed(images))
    model.decoder.blocks[0] = Undo(tokens)
    found = {row.measure: row.mean for row in stream(model, [images], inverse_measures(model))}
    assert found["inverse_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["inverse_error"] == pytest.approx(0.5, abs=1e-4)
    assert found["inverse_error_scaled"] == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        after = model.encoder.blocks[0](tokens)
    error = ((after - tokens).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)).mean()
    assert found["inverse_error_identity"] == pytest.approx(float(error), rel=1e-4)
