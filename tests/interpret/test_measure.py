"""One call measures everything that a model has, and names what it has not."""

import json
import math
from dataclasses import asdict

import pytest
import torch

import crate_mae
from crate_mae.drawing.measures import MEASURES
from crate_mae.errors import UserError
from crate_mae.interpret.measure import measure_layers, open_measurable, untrained_twin
from crate_mae.interpret.statistics import find
from crate_mae.interpret.weights import measure_weights


@pytest.fixture
def digits_model(build):
    return build(mean=(0.3057,), std=(0.3759,))


def test_everything_is_measured(digits_model):
    stages = []
    before = [parameter.clone() for parameter in digits_model.parameters()]
    found = measure_layers(digits_model.train(), "digits:test", count=9, batch_size=4, on_stage=stages.append)
    assert digits_model.training
    assert all(torch.equal(a, b) for a, b in zip(before, digits_model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in digits_model.modules())
    assert stages == ["weights", "rates, sparsity, ranks", "inverses", "information", "audit"]
    assert (found.images, found.data, found.mask_ratio, found.left_out) == (9, "digits:test", None, {})
    for measure, point in [
        ("subspace_rate", "z_half"),
        ("sparsity_penalty", "z_next"),
        ("subspace_rate_official", "projections"),
        ("pooled_rate_reduction", "z_next"),
        ("gini", "code"),
        ("output_cosine", ""),
        ("inverse_dictionary_cosine", ""),
        ("inverse_error_identity", ""),
        ("dead_coordinates", ""),
        ("pixel_r2", "z_next"),
        ("feature_rank", "z_next"),
    ]:
        assert [row.layer for row in find(found.rows, measure, point)] == [0, 1]
    assert len(found.audit) == 2 * 11 + 2 * 3
    assert not {"rate_reduction", "objective"} & {row.measure for row in found.rows}
    again = measure_layers(digits_model, "digits:test", count=9, batch_size=4)
    assert again == found

    assert {row.measure.removesuffix("_control").removesuffix("_identity") for row in found.rows} <= set(MEASURES)
    judged = [asdict(row) for row in found.audit]
    columns = {"tokens", "part", "layer", "claim", "text", "before", "after", "closest_control", "margin", "p_holm"}
    columns |= {"margin_low", "margin_high", "margin_share", "share_of_images", "n", "untrained", "learned"}
    assert set(judged[0]) == columns | {"holds", "status"}
    assert {row["status"] for row in judged} <= {"holds", "does not hold"}


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_masked_passes_differ_from_whole_ones(build, mask_tokens):
    model = build(mask_tokens=mask_tokens)
    whole = measure_layers(model, "digits:test", count=5, audited=False)
    hidden = measure_layers(model, "digits:test", count=5, mask_ratio=0.75, audited=False)
    assert hidden.mask_ratio == 0.75
    for measure in ("coding_rate", "effective_rank"):
        pairs = list(zip(find(whole.rows, measure, "z_next"), find(hidden.rows, measure, "z_next"), strict=True))
        assert pairs
        assert all(abs(a.mean - b.mean) > 1e-3 for a, b in pairs)
    # Weights are the same in both.
    cosines = find(whole.rows, "output_cosine")
    assert cosines and cosines == find(hidden.rows, "output_cosine")


def test_a_vit_is_measured_as_far_as_it_goes(build):
    found = measure_layers(build("vit_mae_nano_patch2_8"), "digits:test", count=5)
    assert set(found.left_out) == {
        "dictionaries",
        "subspace rates",
        "sparsity of codes",
        "audit",
        "dead coordinates",
    }
    assert "value projections stand in" in found.left_out["subspace rates"]
    assert found.audit == []
    for measure in ("coding_rate", "value_rate_official"):
        assert len(find(found.rows, measure, "z_half")) == len(find(found.rows, measure, "z_half", part="decoder")) == 2
    assert find(found.rows, "inverse_error") and not find(found.rows, "inverse_dictionary_cosine")


def test_a_timm_vit_has_no_decoder_and_hides_nothing():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, depth=2, num_classes=0)
    found = measure_layers(model, "digits:test", count=24)
    assert "inverses" in found.left_out
    assert len(find(found.rows, "pixel_r2", "z_next")) == 2
    found = measure_layers(model, "digits:test", count=23)
    assert found.left_out["pixels from layers"].startswith("176 patches of half of the images are too few")
    assert find(found.rows, "pixel_r2", "z_next") == []
    with pytest.raises(UserError, match="cannot hide patches"):
        measure_layers(model, "digits:test", count=5, mask_ratio=0.5)


def test_a_network_without_any_stand_in_is_measured_as_far_as_it_goes():
    import timm

    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", norm_layer=timm.layers.RmsNorm, **small)
    found = measure_layers(model, "digits:test", count=5)
    assert {"subspace rates", "subspace rates by value projections"} <= set(found.left_out)
    assert len(find(found.rows, "coding_rate", "z_half")) == 2


def test_models_of_other_depths_have_no_inverses(build):
    found = measure_layers(build(depth=3), "digits:test", count=4)
    assert found.left_out == {"inverses": "there is no decoder of as many layers, of the same width"}


def test_one_image_leaves_out_what_it_cannot_tell(digits_model):
    found = measure_layers(digits_model, "digits:test", count=1)
    assert set(found.left_out) == {"feature rank and pixels from layers"}
    assert all(row.spread is None for row in found.rows if row.over == "images")
    json.dumps(asdict(found), allow_nan=False)
    assert not any(row.holds for row in found.audit)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_images_are_measured(digits_model, fill):
    found = measure_layers(digits_model, [torch.full((1, 8, 8), fill)] * 4, count=4)
    assert all(math.isfinite(row.mean) for row in found.rows)
    assert find(found.rows, "feature_rank", "z_next")[0].mean < 1.5


def test_images_that_cannot_be_read_are_named(digits_model):
    class Half(list):
        def __getitem__(self, i):
            if i % 2:
                raise OSError(f"no image {i}")
            return super().__getitem__(i)

    found = measure_layers(digits_model, Half([torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))] * 6))
    assert found.images == 3
    assert [bad.location for bad in found.bad] == ["Half[1]", "Half[3]", "Half[5]"]


def test_outputs_of_one_direction_but_several_scales_have_no_common_one(digits_model):
    """W_k = s_k U_k with s = 1, 1, 4 and equal norms: the best common scale is 2, the error sqrt(6/18)."""
    attn = digits_model.encoder.blocks[0].attn
    with torch.no_grad():
        u = torch.eye(24).unflatten(1, (3, 8)).transpose(0, 1)
        attn.subspaces.weight.copy_(u.mT.flatten(0, 1))
        attn.proj.weight.copy_((torch.tensor([1.0, 1.0, 4.0])[:, None, None] * u).transpose(0, 1).flatten(1))
    rows = {row.measure: row.mean for row in measure_weights(digits_model) if (row.part, row.layer) == ("encoder", 0)}
    assert rows["output_error"] == pytest.approx(0, abs=1e-6)
    assert rows["output_error_common"] == pytest.approx(math.sqrt(6 / 18))


def test_networks_of_timm_have_untrained_twins():
    found = open_measurable("timm:test_vit:untrained", 0)
    twin = untrained_twin(found, 1)
    assert twin is not None and twin.name == "timm:test_vit:untrained" and twin.backbone.is_random
    name = "patch_embed.proj.weight"
    assert not torch.equal(twin.net.state_dict()[name], found.net.state_dict()[name])


def test_mistakes_are_sentences(digits_model):
    with pytest.raises(UserError, match="count is 0"):
        measure_layers(digits_model, "digits:test", count=0)
    for model in ("pixels", "timm:efficientnet_b0:untrained", "timm:swin_tiny_patch4_window7_224:untrained"):
        with pytest.raises(UserError, match="not a Vision Transformer"):
            measure_layers(model, "digits:test", count=3)
    with pytest.raises(UserError, match="mask_ratio is 1"):
        measure_layers(digits_model, "digits:test", count=3, mask_ratio=1.0)
    with torch.no_grad():
        digits_model.encoder.blocks[0].norm1.weight[0] = math.nan
    with pytest.raises(UserError, match="Layer 0 of the encoder gives numbers that are not finite"):
        measure_layers(digits_model, "digits:test", count=3)


def test_saved_models_and_presets_are_opened_by_name(digits_model, tmp_path, monkeypatch):
    folder = tmp_path / "pixels_of_digits"  # the name of raw pixels is `pixels`, and no other that begins so
    crate_mae.save(digits_model, folder)
    monkeypatch.chdir(tmp_path)
    unaudited = {"audited": False}
    saved = measure_layers(folder.name, "digits:test", count=3, **unaudited)
    assert saved.rows == measure_layers(digits_model, "digits:test", count=3, **unaudited).rows
    fresh = [
        measure_layers("crate_mae_nano_patch2_8", "digits:test", count=2, seed=seed, **unaudited).rows
        for seed in (0, 0, 1)
    ]
    assert fresh[0] == fresh[1] != fresh[2]
