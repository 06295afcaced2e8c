"""Atoms: strongest patches are found where they were planted, and a linear decoder responds linearly."""

import pytest
import torch

import crate_mae
from crate_mae.interpret.atoms import _Response, measure_atoms
from crate_mae.interpret.pictures import draw_atoms
from crate_mae.models.masking import patchify

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SMALL = {"embed_dim": 12, "depth": 1, "num_heads": 3, "decoder_depth": 1, "decoder_embed_dim": 12}


def build(**settings):
    torch.manual_seed(0)
    return crate_mae.create_model(
        "crate_mae_nano_patch2_8", in_chans=1, **(SMALL | {"decoder_num_heads": 3} | settings)
    ).eval()


class Mean(torch.nn.Module):
    def forward(self, tokens):
        return tokens.mean(1, keepdim=True).expand_as(tokens)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_a_linear_decoder_responds_linearly_and_as_its_weights_say(mask_tokens):
    net = build(mask_tokens=mask_tokens, std=(0.3,))
    net.encoder.norm, net.decoder.norm, net.decoder.blocks = torch.nn.Identity(), torch.nn.Identity(), Mean()
    found = measure_atoms(net, IMAGES, atoms=[7, 2], mask_ratio=0.75)
    embed = getattr(net.decoder.embed, "weight", torch.eye(12))
    for atom, drawn in zip(found.atoms, found.drawn, strict=True):
        # 4 of 16 patches are visible; the mean is over them and the class token, which is not raised, and mask tokens.
        by_hand = 0.3 * atom.std * (4 / 17) * (net.decoder.pred.weight @ embed[:, atom.index])
        assert atom.change == pytest.approx(float(by_hand.detach().square().mean().sqrt()), rel=1e-3)
        assert drawn[2:4, 4:6, 1] == pytest.approx(by_hand.detach().view(2, 2).numpy(), rel=1e-3, abs=1e-6)
        numbers = (atom.cosine, atom.realised, atom.random_cosine, atom.random_cosine_low, atom.random_cosine_high)
        assert numbers == pytest.approx((1,) * 5, abs=1e-5)


def test_the_linear_response_is_what_small_steps_tend_to_and_large_ones_of_a_real_decoder_are_not():
    net = build()
    response = _Response(net, IMAGES, torch.arange(16).expand(6, 16) % 4 > 0, "encoder.blocks.0.code")
    step = torch.zeros(12)
    step[3] = 1.0
    torch.testing.assert_close(response.actual(1e-2 * step), 1e-2 * response.linear(step), rtol=0.05, atol=1e-4)
    (atom,) = measure_atoms(net, IMAGES, atoms=[3]).atoms
    assert 0 < atom.cosine < 1 - 1e-6
    assert atom.random_cosine_low < atom.random_cosine < atom.random_cosine_high < 1
    assert atom.change > 0 and atom.random_change > 0
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_planted_patches_are_found_in_order_one_of_each_image(monkeypatch):
    net, code = build(), torch.zeros(6, 17, 12)
    code[:, 0, 5] = 100.0  # class tokens are not patches
    code[2, 1 + 7, 5], code[4, 1 + 3, 5], code[4, 1 + 9, 5] = 3.0, 2.0, 1.0
    code[:, 1:, 8] = 0.1
    monkeypatch.setattr(net.encoder.blocks[0].ista, "forward", lambda x: code[: len(x)])
    found = measure_atoms(net, IMAGES, count=2)
    first = found.atoms[0]
    assert (first.index, first.chosen, first.active) == (5, "energy", pytest.approx(3 / 96))
    assert found.atoms[1].chosen == "random" and found.atoms[1].index != 5
    assert first.share == pytest.approx(14 / (14 + 96 * 0.01))
    assert first.std == pytest.approx(float(code[:, 1:, 5].std()))
    assert found.strongest[0] == [(2, 7, 3.0), (4, 3, 2.0)]
    assert found.places[0].reshape(-1)[[7, 3, 9, 0]] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    patches = patchify(IMAGES, 2)
    mean = (3 * patches[2, 7] + 2 * patches[4, 3] + patches[4, 9]) / 6 - patches.mean((0, 1))
    assert found.mean_patches[0][..., 0] == pytest.approx((mean * net.config.std[0]).view(2, 2).numpy(), abs=1e-5)


def test_atoms_that_matter_come_first_then_the_largest_then_some_at_random():
    net = build()
    largest = [each.index for each in measure_atoms(net, IMAGES, count=8).atoms if each.chosen == "energy"]
    last = measure_atoms(net, IMAGES, count=12).atoms[-1].index
    found = measure_atoms(net, IMAGES, count=4, mattering={last}).atoms
    assert [(each.index, each.chosen) for each in found[:2]] == [(last, "matters"), (largest[0], "energy")]
    assert [each.chosen for each in found[2:]] == ["random", "random"] and len({each.index for each in found}) == 4
    assert found == measure_atoms(net, IMAGES, count=4, mattering={last}).atoms
    in_batches = measure_atoms(net, IMAGES, count=4, mattering={last}, batch_size=4).atoms
    assert [each.share for each in in_batches] == pytest.approx([each.share for each in found])
    assert found != measure_atoms(net, IMAGES, count=4, mattering={last}, seed=1).atoms


@pytest.mark.parametrize("settings", [{"layer": "monotone"}, {"overcomplete": 2, "ista_skip": True}])
def test_codes_of_other_layers_and_atoms_that_are_never_active(settings):
    net = build(**settings)
    assert draw_atoms(measure_atoms(net, IMAGES, count=4)) is not None
    net.encoder.blocks[0].ista.threshold = 1e6
    found = measure_atoms(net, IMAGES, count=4)
    assert draw_atoms(found) is not None
    for atom in found.atoms:
        assert atom.active == atom.std == atom.change == atom.random_change == 0
        assert atom.cosine is atom.realised is atom.random_cosine is None


def test_what_does_not_exist_is_named_with_its_range():
    net = build(depth=2, decoder_depth=2)
    for options, words in (
        ({"layer": 2}, "There is no layer 2: this encoder has 2 layers, 0 to 1, or -1 to -2"),
        ({"atoms": [3, 12]}, "There is no atom 12 in layer 1: its code has 12, 0 to 11"),
        ({"atoms": [-1]}, "There is no atom -1"),
        ({"count": 0}, "count is 0"),
        ({"draws": 0}, "draws is 0"),
    ):
        with pytest.raises(crate_mae.UserError, match=words):
            measure_atoms(net, IMAGES, **options)


def test_models_without_codes_or_a_decoder_and_fixed_graphs_are_refused():
    with pytest.raises(crate_mae.UserError, match="has no atoms: only the layers of CRATE"):
        measure_atoms(crate_mae.create_model("vit_mae_nano_patch2_8", in_chans=1), IMAGES)
    net = build()
    with pytest.raises(crate_mae.UserError, match="A MaskedEncoder has no decoder"):
        measure_atoms(net.encoder, IMAGES)
    with pytest.raises(crate_mae.UserError, match=r"before `torch\.compile`"):
        measure_atoms(torch.compile(net), IMAGES)
    with pytest.raises(crate_mae.UserError, match="exported model"):
        measure_atoms(torch.export.export(net.encoder, (IMAGES,)).module(), IMAGES)
