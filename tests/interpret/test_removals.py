"""What is lost without a part is what its weights contribute, next to controls of the same size."""

import pytest
import torch

import crate_mae
from crate_mae.evaluation.reconstruction import nested_masks
from crate_mae.interpret.removals import FittedProbe, _other_atoms, image_losses, removals

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
MASKS = nested_masks(6, 16, 0.75, 0)


def build(**settings):
    torch.manual_seed(0)
    small = {
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 3,
        "decoder_depth": 1,
        "decoder_embed_dim": 12,
        "decoder_num_heads": 3,
    }
    return crate_mae.create_model("crate_mae_nano_patch2_8", in_chans=1, **(small | settings)).eval()


def by_name(found):
    return {(each.part, each.layer, each.kind, each.index): each for each in found}


def test_heads_and_atoms_that_do_nothing_cost_nothing_and_the_others_what_their_weights_give():
    net = build()
    layer = net.encoder.blocks[0]
    with torch.no_grad():
        layer.attn.proj.weight[:, 4:8] = 0  # head 1
        layer.ista.dictionary.zero_()  # the code is relu(X - eta lambda)
        layer.norm2.weight[5], layer.norm2.bias[5] = 0, -1  # atom 5 is never active
    found = by_name(removals(net, IMAGES, MASKS, atoms=12, draws=2))
    assert len(found) == 3 + 3 + 12
    assert found["encoder", 0, "head", 1].loss == 0
    unused = found["encoder", 0, "atom", 5]
    assert unused.share == unused.loss == unused.random_loss == unused.beyond == 0 and unused.p == 1
    for kind, count in (("head", 3), ("atom", 12)):
        shares = [found["encoder", 0, kind, i].share for i in range(count)]
        assert sum(shares) == pytest.approx(1)
    head = found["encoder", 0, "head", 2]
    before = image_losses(net, IMAGES, MASKS, 64)
    with torch.no_grad():
        layer.attn.proj.weight[:, 8:] = 0
    change = (image_losses(net, IMAGES, MASKS, 64) - before).mean()
    assert head.loss == pytest.approx(float(change), rel=1e-4) and change != 0
    assert head.beyond == pytest.approx(head.loss - head.random_loss)
    assert head.beyond_low < head.beyond < head.beyond_high and 0 < head.p < 1
    assert {found["encoder", 0, "head", k].random_loss for k in range(3)} == {head.random_loss}, "of one set of draws"
    assert head.accuracy is None and head.worst_class is None


def test_the_largest_atoms_and_some_of_the_others_by_seed_and_the_network_is_left_as_it_was():
    net = build(layer="monotone")
    everything = by_name(removals(net, IMAGES, MASKS, atoms=12, draws=2, batch_size=4))
    shares = {key[3]: each.share for key, each in everything.items() if key[:3] == ("encoder", 0, "atom")}
    few = removals(net, IMAGES, MASKS, atoms=5, draws=2, seed=1, batch_size=4)
    chosen = [each.index for each in few if (each.layer, each.kind) == (0, "atom")]
    assert chosen[:3] == sorted(shares, key=shares.__getitem__, reverse=True)[:3]
    assert len(set(chosen)) == 5
    again = removals(net, IMAGES, MASKS, atoms=5, draws=2, seed=1, batch_size=4)
    assert again == few
    other = removals(net, IMAGES, MASKS, atoms=5, draws=2, seed=2, batch_size=4)
    assert [each.random_loss for each in other] != [each.random_loss for each in few]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_accuracy_is_that_of_one_classifier_on_the_network_without_the_part():
    net = build()
    told = []

    def classify():  # by what the last layer gives: 1 where its first coordinate is active
        with torch.no_grad():
            told.append(net.encoder.forward_features(IMAGES)[:, 1, 0] > 0)
        return told[-1].long()

    labels = classify()
    assert 0 < labels.sum() < 6
    found = removals(net, IMAGES, MASKS, probe=FittedProbe(classify, labels, ["off", "on"]), atoms=2, draws=2)
    asked = [each for each in found if each.part == "encoder"]
    # Asked before, with two draws for the heads, without each head, then with two draws and without each atom.
    assert len(told) == 2 + (2 + 3) + 2 * (2 + 1) and len(asked) == 3 + 2
    for each, without in zip(asked, [*told[4:7], told[9], told[12]], strict=True):
        assert each.accuracy == pytest.approx(float(((without == labels).double()).mean()) - 1)
        assert each.worst_class in {"off", "on"} and each.worst_class_accuracy <= each.accuracy <= 0
    assert all(each.accuracy is None for each in found if each.part == "decoder")


def test_a_vit_has_heads_and_one_draw_has_no_spread():
    torch.manual_seed(0)
    net = crate_mae.create_model("vit_mae_nano_patch2_8", in_chans=1, depth=1, decoder_depth=1).eval()
    seconds = []
    found = removals(net, IMAGES, MASKS, draws=2, on_start=seconds.append)
    assert {each.kind for each in found} == {"head"} and len(found) == 2 * 4
    assert len(seconds) == 1 and seconds[0] > 0
    with pytest.raises(crate_mae.UserError, match="draws is 1, but must be between 2"):
        removals(net, IMAGES, MASKS, draws=1)


@pytest.mark.parametrize("settings", [{}, {"output_projection": "tied"}, {"layer": "compressing"}])
def test_the_size_of_a_head_is_that_of_its_step(settings):
    net = build(**settings)
    if not settings:
        with torch.no_grad():
            net.encoder.blocks[0].attn.proj.weight[:, :4] *= 5
    steps = []
    for k in range(3):
        others = {f"encoder.blocks.0.head_steps[{j}]": 0 for j in range(3) if j != k}
        with torch.no_grad(), crate_mae.intervene(net, others), crate_mae.trace(net, ["encoder.blocks.0.attn"]) as seen:
            net(IMAGES, mask=MASKS)
        bias = getattr(getattr(net.encoder.blocks[0].attn, "proj", None), "bias", None)
        step = seen["encoder.blocks.0.attn"][0] - (0 if bias is None else bias.detach())
        steps.append(float(step.square().sum()))
    found = by_name(removals(net, IMAGES, MASKS, atoms=0, draws=2))
    for k in range(3):
        assert found["encoder", 0, "head", k].share == pytest.approx(steps[k] / sum(steps), rel=1e-3)


def test_the_draws_of_an_atom_are_other_atoms_of_its_share_and_dead_codes_have_none():
    share = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.06, 0.04, 0.0])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for atom in range(7):
            others = _other_atoms(share, atom, generator)
            assert atom not in others and 6 not in others
            assert share[others].sum() <= share[atom] + 1e-6 or (atom == 5 and others == [4])
            assert bool(others) == (atom != 6)
    net = build(threshold=1000.0)
    found = removals(net, IMAGES, MASKS, atoms=2, draws=2)
    assert all(each.share == each.loss == 0 and each.p == 1 for each in found if each.kind == "atom")
