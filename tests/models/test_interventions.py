"""A change is what the equations say it is, composes, and is always undone."""

import copy

import numpy as np
import pytest
import timm
import torch

import crate_mae

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1, "in_chans": 1}
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
KINDS = {
    "published": ("crate_mae_nano_patch2_8", {}),
    "tied": ("crate_mae_nano_patch2_8", {"output_projection": "tied"}),
    "monotone": ("crate_mae_nano_patch2_8", {"layer": "monotone"}),
    "vit": ("vit_mae_nano_patch2_8", {}),
}


def build(kind="published", **settings):
    name, own = KINDS[kind]
    torch.manual_seed(0)
    model = crate_mae.create_model(name, **(SMALL | own | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no two heads of equal size, no bias of 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def masked(model):
    with torch.no_grad():
        return model(IMAGES, mask_ratio=0.5).prediction


def tokens(model):
    with torch.no_grad():
        return model.encoder.forward_features(IMAGES)


def changed(model, changes, run=masked):
    with crate_mae.intervene(model, changes):
        return run(model)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["encoder.blocks.1", "decoder.blocks.0"])
def test_a_head_is_scaled_as_its_weights_would_be(kind, part):
    """Head 2's columns of the output projection scaled by hand, where there is one; else its share of the step."""
    model = build(kind)
    name = f"{part}.head_steps[2]"
    found = changed(model, {name: 0.25})
    assert not torch.allclose(found, masked(model), atol=1e-3)
    by_hand = copy.deepcopy(model)
    attn = by_hand.get_submodule(part).attn
    if getattr(attn, "proj", None) is not None:
        with torch.no_grad():
            attn.proj.weight[:, 16:] *= 0.25
    else:
        step = attn.step

        def scaled(w, mixed, u=None):
            bases = attn.bases()
            steps = mixed if kind == "tied" else attn.rate() * (mixed - w)
            each = torch.einsum("bhnp,hdp->hbnd", steps, bases)
            torch.testing.assert_close(each.sum(0), step(w, mixed), rtol=1e-5, atol=1e-5)
            return each[0] + each[1] + 0.25 * each[2]

        attn.step = scaled
    assert_same(found, masked(by_hand))


@pytest.mark.parametrize("kind", ["published", "monotone"])
def test_removing_a_projection_removes_the_step_of_its_subspace(kind):
    model = build(kind)
    removed = changed(model, {"encoder.blocks.0.projections[1]": 0})
    assert_same(removed, changed(model, {"encoder.blocks.0.head_steps[1]": 0.0}))
    half = changed(model, {"encoder.blocks.0.projections[1]": 0.5})
    assert not torch.allclose(half, changed(model, {"encoder.blocks.0.head_steps[1]": 0.5}), atol=1e-3)


def test_atoms_are_replaced_scaled_and_given_to_functions():
    model = build()
    with torch.no_grad(), crate_mae.trace(model, ["encoder.blocks.0.code"]) as seen:
        model.encoder.forward_features(IMAGES)
    (code,) = seen["encoder.blocks.0.code"]
    for change, new in [
        (0, torch.zeros_like(code[..., 7])),
        (3.0, 3 * code[..., 7]),
        (lambda a: a + 0.5, code[..., 7] + 0.5),
        (torch.tensor(2.0), torch.full_like(code[..., 7], 2.0)),
        (torch.arange(17.0), torch.arange(17.0).expand(5, 17)),
    ]:
        with crate_mae.trace(model, ["encoder.blocks.*.code", "encoder.blocks.1.z"]) as seen:
            changed(model, {"encoder.blocks.0.code[7]": change}, tokens)
        (now,) = seen["encoder.blocks.0.code"]
        assert torch.equal(now[..., 7], new)
        assert torch.equal(now[..., :7], code[..., :7]) and torch.equal(now[..., 8:], code[..., 8:])
        assert torch.equal(seen["encoder.blocks.1.z"][0], now)


def test_codes_of_overcomplete_dictionaries_are_those_before_the_readout():
    model = build(overcomplete=4, ista_skip=True)
    without = changed(model, {"encoder.blocks.1.code[90]": 0}, tokens)
    assert not torch.allclose(without, tokens(model))
    with torch.no_grad():
        model.encoder.blocks[1].ista.readout.weight[:, 90] = 0
    assert_same(without, tokens(model))
    with pytest.raises(crate_mae.UserError, match="atoms are 0 to 95"):
        changed(model, {"encoder.blocks.1.code[96]": 0})
    with pytest.raises(crate_mae.UserError, match=r'called "\*\.z_half"'):
        changed(model.encoder, {"*.z_half": 0})


def test_a_token_and_whole_steps():
    model = build()
    with torch.no_grad(), crate_mae.trace(model, ["encoder.blocks.1.z", "encoder.blocks.1.z_half"]) as seen:
        changed(model, {"encoder.blocks.1.z[4]": 0, "encoder.blocks.1.attn": 0}, tokens)
    z, half = seen["encoder.blocks.1.z"][0], seen["encoder.blocks.1.z_half"][0]
    assert (z[:, 4] == 0).all() and (z[:, 5] != 0).any()
    assert torch.equal(half, z)
    decoder = model.decoder.blocks[0]
    with torch.no_grad(), crate_mae.trace(model, ["decoder.blocks.0.z_half", "decoder.blocks.0.z_next"]) as seen:
        changed(model, {"decoder.blocks.0.z_half[0]": torch.ones(24)})
    half, after = seen["decoder.blocks.0.z_half"][0], seen["decoder.blocks.0.z_next"][0]
    assert (half[:, 0] == 1).all()
    with torch.no_grad():
        assert_same(after, half - decoder.attn(decoder.norm2(half)))


def number_of_hooks(model):
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_undone_and_counted(kind):
    model = build(kind)
    before, hooks = masked(model), number_of_hooks(model)
    with crate_mae.intervene(model, {"encoder.blocks.*.head_steps": 0, "decoder.blocks.0.z[1]": 0}) as applied:
        masked(model)
        tokens(model)
    assert applied == {
        "encoder.blocks.0.head_steps": 2,
        "encoder.blocks.1.head_steps": 2,
        "decoder.blocks.0.z[1]": 1,
    }
    with pytest.raises(RuntimeError, match="stop"), crate_mae.intervene(model, {"*.z_next": 0}):
        raise RuntimeError("stop")
    with (
        pytest.raises(crate_mae.UserError, match="changed already"),
        crate_mae.intervene(model, {"*.z_next": 0, "encoder.blocks.0.z_next[1]": 0}),
    ):
        pass
    assert number_of_hooks(model) == hooks
    assert torch.equal(before, masked(model))


def test_a_trace_sees_what_was_changed_whichever_comes_first():
    model = build()
    pattern = ["encoder.blocks.0.head_steps", "encoder.blocks.1.z"]
    changes = {"encoder.blocks.0.head_steps[0]": 0, "encoder.blocks.1.z[2]": 0}
    trace = crate_mae.trace
    with trace(model, pattern) as outer, crate_mae.intervene(model, changes), trace(model, pattern) as inner:
        tokens(model)
    for name in outer:
        assert torch.equal(outer[name][0], inner[name][0])
    assert (outer["encoder.blocks.0.head_steps"][0][:, 0] == 0).all()
    assert (outer["encoder.blocks.1.z"][0][:, 2] == 0).all()


def test_gradients_pass_through_and_autocast_keeps_its_precision():
    model = build("monotone")
    shift = torch.zeros(24, requires_grad=True)
    with crate_mae.intervene(model, {"encoder.blocks.0.z_next[3]": lambda z: z + shift}):
        model(IMAGES, mask_ratio=0.5).loss.backward()
    assert shift.grad is not None and shift.grad.abs().sum() > 0
    patterns = ["encoder.blocks.0.head_steps", "encoder.blocks.0.attn.subspaces"]
    with torch.autocast("cpu", torch.bfloat16), crate_mae.trace(model, patterns) as seen:
        changed(model, {"encoder.blocks.0.head_steps[0]": torch.ones(())})
    (steps,) = seen["encoder.blocks.0.head_steps"]
    assert (steps[:, 0] == 1).all() and steps.dtype == torch.bfloat16  # that of the projections
    assert seen["encoder.blocks.0.attn.subspaces"][0].dtype == torch.bfloat16


def test_blocks_of_timm():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, depth=2, num_classes=0
    ).eval()
    with torch.no_grad():
        found = changed(model, {"blocks.1.head_steps[1]": 0}, lambda net: net(IMAGES))
        model.blocks[1].attn.proj.weight[:, 64:128] = 0
        assert_same(found, model(IMAGES))
        with pytest.raises(crate_mae.UserError, match=r"each with z, z_next, head_steps\."):
            changed(model, {"blocks.1.code[1]": 0}, lambda net: net(IMAGES))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"encoder.blocks.7.code": 0},
            r'"encoder\.blocks\.7\.code"\. Its layers are encoder\.blocks\.0 to decoder\.blocks\.0',
        ),
        ({"encoder.blocks.1.head_steps[3]": 0}, "heads are 0 to 2"),
        ({"encoder.blocks.1.code[-1]": 0}, "atoms are 0 to 23"),
        ({"encoder.blocks.1.z[17]": 0}, "tokens are 0 to 16"),
        ({"encoder.blocks.1.z[-1]": 0}, "tokens are counted from 0"),
        ({"encoder.blocks.1.attn[0]": 0}, r"leave out \[0\]"),
        ({"encoder.blocks.1.attn": True}, "True is not a number"),
        ({"encoder.blocks.1.attn": "off"}, "'off' is not a number"),
        ({"encoder.blocks.1.attn": float("nan")}, "must be finite"),
        ({"encoder.blocks.1.attn": 10**400}, "must be finite"),
        ({"encoder.*": 0, "encoder.blocks.0.code": 0}, "changed already, as"),
        ({"encoder.blocks.1.code[0]": torch.zeros(3)}, r"tensor of \(5, 17\): \(3,\) cannot take its place"),
        ({"encoder.blocks.1.code[0]": lambda code: None}, "NoneType cannot take its place"),
        ({"*.code": 0, "encoder.blocks.1.ista": 0}, "changed already, as"),
        ({"*.code[1]": 0, "encoder.blocks.1.code[1]": 2}, "changed already, as"),
    ],
)
def test_mistakes_are_sentences(changes, says):
    model = build()
    with pytest.raises(crate_mae.UserError, match=says):
        changed(model, changes)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_blocks_within_each_other_combine_or_are_refused():
    model = build()
    with crate_mae.intervene(model, {"*.head_steps[0]": 0}):
        both = changed(model, {"*.head_steps[1]": 0})
        with pytest.raises(crate_mae.UserError, match="changed already"):
            changed(model, {"encoder.blocks.0.head_steps": 0})
    assert_same(both, changed(model, {"*.head_steps[0]": 0, "*.head_steps[1]": 0}))


def test_copies_made_inside_are_intact(tmp_path):
    model = build()
    before = masked(model)
    with crate_mae.intervene(model, {"*.code": 0, "encoder.blocks.0.z[1]": 0}):
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        assert not torch.equal(masked(model), before)
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (copied, saved):
        assert torch.equal(masked(each), before)
        assert not torch.equal(changed(each, {"*.code": 0}), before)


def test_functions_may_write_in_place_and_numbers_may_be_of_numpy():
    model = build()
    with crate_mae.trace(model, ["encoder.blocks.0.z_next"]) as seen:
        zeroed = changed(model, {"encoder.blocks.1.z[2]": lambda z: z.zero_()})
    assert (seen["encoder.blocks.0.z_next"][0][:, 2] != 0).any()
    assert torch.equal(zeroed, changed(model, {"encoder.blocks.1.z[2]": np.float32(0)}))


def test_what_no_pass_comes_by_is_named(caplog):
    model = build()
    changed(model, {"encoder": 0, "encoder.blocks.0.code": 1})
    assert "no forward pass reached encoder." in caplog.text


def test_compiled_and_exported_models_are_refused():
    model = build()
    with pytest.raises(crate_mae.UserError, match=r"before `torch\.compile`"):
        changed(torch.compile(model), {"*.code": 0})
    in_place = build()
    in_place.encoder.blocks[0].compile()
    with pytest.raises(crate_mae.UserError, match=r"before `torch\.compile`"):
        changed(in_place, {"*.code": 0})
    exported = torch.export.export(build().encoder, (IMAGES,)).module()
    with pytest.raises(crate_mae.UserError, match="exported model"):
        changed(exported, {"*.code": 0})
