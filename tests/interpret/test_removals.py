"""What is lost without a part is what its weights contribute, next to controls of the same size."""

import pytest
import torch

import crate_mae
from crate_mae.evaluation.reconstruction import nested_masks
from crate_mae.interpret.attention_use import image_losses
from crate_mae.interpret.removals import Probe, removals

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
    assert head.beyond_low < head.beyond < head.beyond_high
    assert head.accuracy is None and head.worst_class is None


def test_the_largest_atoms_and_some_of_the_others_by_seed_and_the_network_is_left_as_it_was():
    net = build(layer="monotone")
    everything = by_name(removals(net, IMAGES, MASKS, atoms=12, draws=1, batch_size=4))
    shares = {key[3]: each.share for key, each in everything.items() if key[:3] == ("encoder", 0, "atom")}
    few = removals(net, IMAGES, MASKS, atoms=5, draws=1, seed=1, batch_size=4)
    chosen = [each.index for each in few if (each.layer, each.kind) == (0, "atom")]
    assert chosen[:3] == sorted(shares, key=shares.__getitem__, reverse=True)[:3]
    assert len(set(chosen)) == 5
    again = removals(net, IMAGES, MASKS, atoms=5, draws=1, seed=1, batch_size=4)
    assert again == few
    other = removals(net, IMAGES, MASKS, atoms=5, draws=1, seed=2, batch_size=4)
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
    found = removals(net, IMAGES, MASKS, probe=Probe(classify, labels, ["off", "on"]), atoms=2, draws=2)
    asked = [each for each in found if each.part == "encoder"]
    assert len(told) == 2 + 3 * len(asked)  # without, and with two controls each; decoders are not asked
    for each, without in zip(asked, told[2::3], strict=True):
        assert each.accuracy == pytest.approx(float(((without == labels).double()).mean()) - 1)
        assert each.worst_class in {"off", "on"} and each.worst_class_accuracy <= each.accuracy <= 0
    assert all(each.accuracy is None for each in found if each.part == "decoder")


def test_a_vit_has_heads_and_one_image_has_no_interval():
    torch.manual_seed(0)
    net = crate_mae.create_model("vit_mae_nano_patch2_8", in_chans=1, depth=1, decoder_depth=1).eval()
    seconds = []
    found = removals(net, IMAGES, MASKS, draws=1, on_start=seconds.append)
    assert {each.kind for each in found} == {"head"} and len(found) == 2 * 4
    assert len(seconds) == 1 and seconds[0] > 0
    with pytest.raises(crate_mae.UserError, match="at least two"):
        removals(net, IMAGES[:1], MASKS[:1])
