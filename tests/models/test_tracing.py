"""What a trace collects is what the layers computed, and nothing stays behind."""

import pytest
import timm
import torch

import crate_mae
from crate_mae.models.tracing import INTERMEDIATES, layers_of, trace, trace_layer
from crate_mae.theory import attention_membership, ista_step

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1, "in_chans": 1}
ALL = [f"*.{kind}" for kind in INTERMEDIATES]
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def build(name="crate_mae_nano_patch2_8", **settings):
    torch.manual_seed(0)
    return crate_mae.create_model(name, **(SMALL | settings)).eval()


def traced(model, patterns, run):
    with torch.no_grad(), trace(model, patterns) as record:
        run(model)
    return {name: values[0] for name, values in record.items()}


def masked(model):
    return model(IMAGES, mask_ratio=0.5)


def unmasked(model):
    return model.encoder.forward_features(IMAGES)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_intermediates_are_the_equations_of_the_layers(mask_tokens):
    model = build(mask_tokens=mask_tokens)
    found = traced(model, ALL, masked)
    tokens = 17 if mask_tokens == "encoder" else 9
    assert len(found) == 2 * 8 + 6
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            z, half, after = (found[f"{name}.{kind}"] for kind in ("z", "z_half", "z_next"))
            if name.startswith("encoder"):
                assert z.shape == (5, tokens, 24)
                normalised = layer.norm1(z)
                assert_same(half, z + layer.attn(normalised))
                x = layer.norm2(half)
                assert_same(after, ista_step(x, layer.ista.dictionary, layer.ista.step_size, layer.ista.threshold))
                assert torch.equal(found[f"{name}.code"], after)
                assert torch.equal(found[f"{name}.preactivation"].relu(), after)
                assert (found[f"{name}.preactivation"] < 0).any()
            else:
                normalised = layer.norm2(half)
                assert_same(half, layer.dictionary(layer.norm1(z)))
                assert_same(after, half - layer.attn(normalised))
            w = found[f"{name}.projections"]
            assert_same(w, normalised[:, None] @ layer.attn.bases())
            attention = found[f"{name}.attention"]
            assert_same(attention, attention_membership(w))
            assert_same(found[f"{name}.head_steps"], attention @ w)
            heads = found[f"{name}.head_steps"].transpose(1, 2).flatten(2)
            assert_same(layer.attn.proj(heads), layer.attn(normalised))


def test_names_are_in_the_models_order_and_layers_are_chained():
    found = traced(build(), ALL, unmasked_and_decoded)
    assert list(found)[:9] == [f"encoder.blocks.0.{kind}" for kind in INTERMEDIATES] + ["encoder.blocks.1.z"]
    assert torch.equal(found["encoder.blocks.0.z_next"], found["encoder.blocks.1.z"])


def unmasked_and_decoded(model):
    return model.decoder(unmasked(model))


def test_vit_layers_give_what_they_have():
    model = build("vit_mae_nano_patch2_8")
    found = traced(model, ["*.attention", "*.head_steps", "*.z", "*.z_half", "*.z_next"], masked)
    assert len(found) == 3 * 5
    for name, layer in layers_of(model).items():
        with torch.no_grad():
            x = layer.norm1(found[f"{name}.z"])
            assert_same(found[f"{name}.z_half"], found[f"{name}.z"] + layer.attn(x))
            v = layer.attn.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)[2]
            assert_same(found[f"{name}.head_steps"], found[f"{name}.attention"] @ v)
            heads = found[f"{name}.head_steps"].transpose(1, 2).flatten(2)
            assert_same(layer.attn.proj(heads), layer.attn(x))
    with pytest.raises(crate_mae.UserError, match=r'is called "\*.code"'), trace(model, ["*.code"]):
        pass


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"init_values": 0.1}])
def test_any_timm_vit_is_traced(options):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, depth=2, num_classes=0, **options
    ).eval()
    found = traced(model, ["blocks.*.attention", "blocks.1.attn.k_norm"], lambda m: m(IMAGES))
    assert found["blocks.0.attention"].shape == (5, 3, 17, 17)
    assert_same(found["blocks.0.attention"].sum(-1), torch.ones(5, 3, 17))
    z = traced(model, ["blocks.1.z", "blocks.1.attn"], lambda m: m(IMAGES))
    attn = model.blocks[1].attn
    with torch.no_grad():
        x = model.blocks[1].norm1(z["blocks.1.z"])
        v = attn.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)[2]
        heads = (found["blocks.1.attention"] @ v).transpose(1, 2).flatten(2)
        assert_same(attn.proj(heads), z["blocks.1.attn"])
    with trace(model, ["blocks.*.attention", "blocks.1.attn.k_norm"]) as record:
        model(IMAGES)
    assert len(record["blocks.1.attn.k_norm"]) == 1


def test_autocast_is_traced_as_it_runs():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        found = traced(model, ALL, masked)
    code = found["encoder.blocks.1.code"]
    assert code.dtype == found["encoder.blocks.1.attention"].dtype == torch.bfloat16
    assert torch.equal(found["encoder.blocks.1.preactivation"].relu(), code)
    exact = traced(model, ALL, masked)
    for name, value in found.items():
        assert (value.float() - exact[name]).norm() < 0.1 * exact[name].norm()


def test_overcomplete_codes_are_those_before_the_readout():
    model = build(overcomplete=4)
    found = traced(model, ["encoder.blocks.0.code", "encoder.blocks.0.ista"], masked)
    code = found["encoder.blocks.0.code"]
    assert code.shape == (5, 17, 96) and (code >= 0).all()
    assert_same(model.encoder.blocks[0].ista.readout(code), found["encoder.blocks.0.ista"])
    assert "encoder.blocks.0.preactivation" not in traced(model, ["*.code"], masked)


def test_hooks_go_however_the_block_ends_and_results_are_the_same():
    model = build()
    before = masked(model)
    with pytest.raises(RuntimeError, match="stop"), trace(model, ALL):
        masked(model)
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
    with trace(model, ALL) as record:
        during = masked(model)
    assert torch.equal(before.prediction, during.prediction)
    assert all(len(values) == 1 and not values[0].requires_grad for values in record.values())


def test_a_name_of_sub_modules_never_asks_for_intermediates():
    model = build()
    assert list(traced(model, ["encoder.blocks.0.attn*"], masked)) == [
        "encoder.blocks.0.attn",
        "encoder.blocks.0.attn.per_head",
        "encoder.blocks.0.attn.subspaces",
        "encoder.blocks.0.attn.proj",
    ]
    with (
        pytest.raises(crate_mae.UserError, match=r"blocks\.7\.attention"),
        trace(model, ["encoder.blocks.7.attention"]),
    ):
        pass


def test_one_layer_alone_gives_what_it_gives_in_the_model():
    model = build()
    found = traced(model, [f"encoder.blocks.1.{kind}" for kind in ("z", "z_half", "code")], unmasked)
    layer = model.encoder.blocks[1]
    with torch.no_grad():
        alone = trace_layer(layer, found["encoder.blocks.1.z"], ("z_half", "code"))
    assert set(alone) == {"z_half", "code"}
    for kind, value in alone.items():
        assert_same(value, found[f"encoder.blocks.1.{kind}"])
    assert not any(module._forward_hooks for module in layer.modules())
