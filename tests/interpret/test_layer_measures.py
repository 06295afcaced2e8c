"""Values of batches are the statistics of all values, and measures are those of the definitions."""

import math
import weakref

import pytest
import timm
import torch

from crate_mae.errors import UserError
from crate_mae.interpret.layer_measures import LayerMeasure, layer_measures, missing, stream
from crate_mae.interpret.statistics import Statistic, find, rows_over_layers, statistic
from crate_mae.models.tracing import trace
from crate_mae.theory import coding_rate, effective_rank, official_subspace_coding_rate, subspace_coding_rate
from crate_mae.theory.measures import gini


def test_statistics_are_in_float64():
    values = 1e6 + torch.randn(23, generator=torch.Generator().manual_seed(0))
    exact = values.double()
    assert statistic(values) == pytest.approx((float(exact.mean()), float(exact.std()), 23), rel=1e-9)


def test_changes_from_the_first_layer_are_paired_over_images():
    first, last = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2.0, 12.0, 103.0])
    values = {("encoder", 0): first, ("decoder", 0): last, ("encoder", 1): last}
    rows = {(row.part, row.layer): row for row in rows_over_layers(values, "x")}
    assert (rows["encoder", 1].change, rows["encoder", 1].change_spread) == pytest.approx((2.0, 1.0))
    assert rows["encoder", 1].spread > 50
    assert (rows["decoder", 0].change, rows["encoder", 0].change_spread) == (0.0, 0.0)


def test_intervals_are_students():
    low, high = Statistic(3.0, 2.0, 4).interval()  # t(0.975, 3) = 3.18245, and 2 / sqrt(4) = 1
    assert (low, high) == pytest.approx((3 - 3.18245, 3 + 3.18245), rel=1e-4)
    assert Statistic(3.0, None, 1).interval() == (-math.inf, math.inf)


@pytest.mark.parametrize("batch_size", [7, 3, 1])
def test_streamed_measures_are_those_of_the_traces(build, images, batch_size):
    model = build()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh ones are all alike, and could be mistaken for each other
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    rows = stream(model, images.split(batch_size), layer_measures())
    with (
        torch.no_grad(),
        trace(model, ["*.z", "*.z_half", "*.z_next", "*.projections", "*.attention", "*.code"]) as record,
    ):
        model(images, mask=torch.zeros(len(images), model.num_patches, dtype=torch.bool))
    for name, part, layer in (("encoder.blocks.1", "encoder", 1), ("decoder.blocks.0", "decoder", 0)):
        block = model.get_submodule(name)
        u = block.attn.bases().detach()
        expected = {}
        for point in ("z", "z_half", "z_next"):
            tokens = record[f"{name}.{point}"][0]
            expected["coding_rate", point] = coding_rate(tokens)
            expected["subspace_rate", point] = subspace_coding_rate(tokens, u)
            expected["sparsity_penalty", point] = 0.1 * (tokens != 0).sum((1, 2)).float()
        seen = "z" if part == "encoder" else "z_half"
        hooked = official_subspace_coding_rate(record[f"{name}.projections"][0])
        expected["subspace_rate_official", "projections"] = expected["subspace_rate_unit", seen] = hooked
        before, after = (record[f"{name}.{p}"][0] for p in (("z", "z_half") if seen == "z" else ("z_half", "z_next")))
        expected["length_ratio", ""] = (after.norm(dim=-1) / before.norm(dim=-1)).mean(1)
        expected["self_attention", ""] = record[f"{name}.attention"][0].diagonal(dim1=-2, dim2=-1).mean((1, 2))
        expected["effective_rank", "z_next"] = effective_rank(tokens)
        expected["gini", "z_next"] = gini(tokens).mean(1)
        for (measure, point), values in expected.items():
            (found,) = [row for row in find(rows, measure, point, part) if row.layer == layer]
            assert (found.mean, found.spread) == pytest.approx((float(values.mean()), float(values.std())), rel=1e-3)
            assert (found.n, found.over) == (7, "images")
    codes = find(rows, "zero_fraction", "code")
    assert [row.layer for row in codes] == [0, 1]
    assert codes[1].mean == pytest.approx(float((record["encoder.blocks.1.code"][0] == 0).float().mean()))
    assert 0 < codes[1].mean < 1


def test_a_vit_has_no_subspace_rates_and_says_so(build, images):
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2, "num_classes": 0}
    for model in (build("vit_mae_nano_patch2_8"), timm.create_model("vit_tiny_patch16_224", **small).eval()):
        rows = stream(model, [images], layer_measures())
        assert missing(model, layer_measures()) == ["subspace rates", "sparsity of codes"]
        assert [row.layer for row in find(rows, "coding_rate", "z_half")] == [0, 1]
        assert not find(rows, "subspace_rate", "z")


def test_a_black_boxs_stand_in_is_the_official_rate_of_its_values(build, images):
    model = build("vit_mae_nano_patch2_8").encoder
    generator = torch.Generator().manual_seed(2)
    for block in model.blocks:
        for parameter in (*block.norm1.parameters(), block.attn.qkv.bias):  # fresh ones would hide a mistake
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    rows = stream(model, [images], layer_measures())
    with torch.no_grad(), trace(model, ["blocks.*.attn.qkv", "blocks.*.z_next"]) as record:
        model.forward_features(images)
    for layer in (0, 1):
        attn, norm = model.blocks[layer].attn, model.blocks[layer].norm1
        values = (record[f"blocks.{layer}.attn.qkv"][0] - attn.qkv.bias)[..., 2 * 24 :]
        after = norm(record[f"blocks.{layer}.z_next"][0]) @ attn.qkv.weight[2 * 24 :].T
        for point, projected in (("z", values), ("projections", values), ("z_next", after)):
            expected = official_subspace_coding_rate(projected.detach().unflatten(-1, (3, 8)).transpose(1, 2))
            assert find(rows, "value_rate_official", point)[layer].mean == pytest.approx(
                float(expected.mean()), rel=1e-5
            )


def test_only_the_direction_of_values_counts(build, images):
    model = build("vit_mae_nano_patch2_8").encoder
    before = find(stream(model, [images], layer_measures()), "value_rate_official", "z")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[2 * 24 :] *= 7
        model.blocks[0].attn.qkv.weight[: 2 * 24] = 0  # queries and keys
    after = find(stream(model, [images], layer_measures()), "value_rate_official", "z")
    assert after[0].mean == pytest.approx(before[0].mean, rel=1e-5)
    assert after[1].mean != pytest.approx(before[1].mean, rel=1e-3)


def test_tokens_are_not_kept(build, images):
    seen = []

    def values(layer, code):
        # What earlier batches and layers were measured on is gone by now.
        assert not any(reference() is not None for reference in seen)
        seen.append(weakref.ref(code))
        return {("mean", ""): code.mean((1, 2))}

    measure = LayerMeasure("mean code", ("code",), values)
    assert len(stream(build(), images.split(2), [measure])) == 2
    assert len(seen) == 2 * 4


def test_no_hook_is_left(build, images):
    model = build()
    with pytest.raises(UserError, match="not finite"):
        stream(model, [images * math.nan], layer_measures())
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_nan_are_a_sentence(build, images):
    model = build()
    with torch.no_grad():
        model.encoder.blocks[1].ista.dictionary[0, 0] = math.nan
    with pytest.raises(UserError, match=r"Layer 1 of the encoder gives numbers that are not finite \(in "):
        stream(model, [images], layer_measures())


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_a_constant_image_and_a_batch_of_one_are_measured(build, fill):
    rows = stream(build(), [torch.full((1, 1, 8, 8), fill)], layer_measures())
    assert {row.n for row in rows} == {1}
    assert {row.spread for row in rows} == {None}
    assert all(math.isfinite(row.mean) for row in rows)


@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_equal_tokens_have_the_measures_of_one_direction(build, name, fill):
    layer = build(name).encoder.blocks[0]
    tokens, seen = torch.full((2, 17, 24), fill), set()
    for measure in layer_measures():
        if set(measure.needs) <= {"z", "z_half", "z_next"} and measure.applies(layer):
            for (name, _), values in measure.values(layer, *[tokens] * len(measure.needs)).items():
                assert values.isfinite().all()
                seen.add(name)
                if name in ("effective_rank", "participation_ratio"):
                    assert values.tolist() == pytest.approx([1, 1], rel=1e-3)
                if name == "token_diversity":
                    assert values.tolist() == [0, 0]
    assert {"effective_rank", "participation_ratio", "token_diversity"} <= seen


def test_under_autocast_measures_are_close_to_those_in_float32(build, images):
    model = build()
    exact = stream(model, [images], layer_measures())
    with torch.autocast("cpu", torch.bfloat16):
        found = stream(model, [images], layer_measures())
    for measure in ("coding_rate", "subspace_rate", "subspace_rate_unit", "effective_rank"):
        pairs = list(zip(find(found, measure, "z_next"), find(exact, measure, "z_next"), strict=True))
        assert pairs
        assert all(
            row.mean == pytest.approx(wanted.mean, rel=0.05) and row.mean != wanted.mean for row, wanted in pairs
        )


def test_masked_passes_are_measured_by_the_callers_forward(build, images):
    model = build(mask_tokens="decoder")
    mask = torch.zeros(7, 16, dtype=torch.bool)
    mask[:, 3:] = True
    shapes = []

    def values(layer, z):
        shapes.append(tuple(z.shape))
        return {("one", ""): torch.ones(len(z))}

    stream(model, [images], [LayerMeasure("ones", ("z",), values)], forward=lambda net, batch: net(batch, mask=mask))
    assert shapes == [(7, 4, 24)] * 2 + [(7, 17, 24)] * 2
