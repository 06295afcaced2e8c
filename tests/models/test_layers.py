"""The layers, held to the equations of the paper."""

import copy

import pytest
import torch

from crate_mae.models import layers
from crate_mae.models.layers import ISTA, MSSA, DecoderLayer, Dictionary, EncoderLayer, OvercompleteISTA
from crate_mae.models.monotone import BoundedISTA


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def reference_mssa(z, layer):
    u = layer.bases()
    heads = [torch.softmax(z @ u_k @ (z @ u_k).mT / u_k.shape[1] ** 0.5, dim=-1) @ (z @ u_k) for u_k in u]
    if layer.proj is None:
        return sum(head @ u_k.T for head, u_k in zip(heads, u, strict=True))
    return torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("projection", ["free", "tied"])
def test_mssa_is_the_sum_over_subspaces(projection):
    layer, z = MSSA(21, 3, output_projection=projection), torch.randn(2, 5, 21)
    torch.testing.assert_close(layer(z), reference_mssa(z, layer))


def test_ista_is_the_three_product_form_with_the_same_gradients():
    layer, x = ISTA(11, step_size=0.13, threshold=0.3), torch.randn(2, 7, 11, requires_grad=True)
    d = layer.dictionary
    reference = torch.relu(x + 0.13 * (x @ d - x @ d.T @ d) - 0.13 * 0.3)
    torch.testing.assert_close(layer(x), reference, rtol=1e-12, atol=1e-13)
    weight = torch.randn(2, 7, 11)
    ours = torch.autograd.grad((layer(x) * weight).sum(), [x, d])
    theirs = torch.autograd.grad((reference * weight).sum(), [x, d])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def change_numbers(d):
    d.data[1, 2] += 0.5


def take_other_memory(d):
    d.data = d.data + 0.5


def step(d):
    with torch.no_grad():
        d.add_(0.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [change_numbers, take_other_memory, step])
def test_in_eval_mode_the_operator_is_formed_once_and_again_when_the_dictionary_changes(change, mode, monkeypatch):
    formed = []
    form = layers.ista_operator
    monkeypatch.setattr(layers, "ista_operator", lambda *of: formed.append(of) or form(*of))
    layer, x = ISTA(11, step_size=0.13, threshold=0.3).eval(), torch.randn(2, 7, 11)

    def evaluated():
        with mode():
            return layer(x)

    for change_something in (lambda: None, lambda: change(layer.dictionary), lambda: setattr(layer, "step_size", 0.17)):
        change_something()
        del formed[:]
        outputs = [evaluated() for _ in range(3)]
        assert len(formed) == 1
        d = layer.dictionary.detach()
        expected = torch.relu(x + layer.step_size * (x @ d - x @ d.T @ d) - layer.step_size * 0.3)
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    layer.train()(x)
    assert layer._kept._entry is None
    assert list(layer.state_dict()) == ["dictionary"]


def test_what_is_kept_follows_the_number_of_steps():
    layer, x = BoundedISTA(8).eval(), torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = []
        for steps in (1, 2, 1):
            layer.steps = steps
            codes.append(layer(x))
    assert torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[1])


def test_the_kept_operator_follows_the_precision():
    layer, x = ISTA(11).float().eval(), torch.randn(2, 7, 11, dtype=torch.float32)
    with torch.no_grad():
        wide = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), wide)
        assert layer.double()(x.double()).dtype == torch.float64
        assert torch.equal(copy.deepcopy(layer)(x.double()), layer(x.double()))


def test_encoder_layer_compresses_then_sparsifies():
    layer, z = EncoderLayer(21, 3), torch.randn(2, 5, 21)
    half = z + reference_mssa(layer.norm1(z), layer.attn)
    torch.testing.assert_close(layer(z), layer.ista(layer.norm2(half)))
    assert (layer(z) >= 0).all()


def test_skip_adds_the_code_instead_of_replacing_the_tokens():
    plain, skip = EncoderLayer(21, 3), EncoderLayer(21, 3, ista_skip=True)
    skip.load_state_dict(plain.state_dict())
    z = torch.randn(2, 5, 21)
    half = z + plain.attn(plain.norm1(z))
    torch.testing.assert_close(skip(z), half + plain(z))


def test_overcomplete_codes_are_read_out_and_added():
    layer, z = EncoderLayer(21, 3, overcomplete=4, ista_skip=True), torch.randn(2, 5, 21)
    assert isinstance(layer.ista, OvercompleteISTA)
    assert layer.ista.dictionary.shape == (21, 84)
    half = z + layer.attn(layer.norm1(z))
    x, d = layer.norm2(half), layer.ista.dictionary
    codes = torch.relu(0.1 * x @ d - 0.05)
    codes = torch.relu(codes + 0.1 * (x - codes @ d.T) @ d - 0.05)
    torch.testing.assert_close(layer(z), half + codes @ layer.ista.readout.weight.T)


def test_decoder_layer_steps_the_other_way():
    layer, y = DecoderLayer(21, 3), torch.randn(2, 5, 21)
    half = layer.norm1(y) @ layer.dictionary.weight.T
    torch.testing.assert_close(layer(y), half - reference_mssa(layer.norm2(half), layer.attn))


def test_encoder_layer_takes_timms_arguments_but_no_mask():
    layer, z = EncoderLayer(21, 3), torch.randn(2, 5, 21)
    torch.testing.assert_close(layer(z, attn_mask=None, is_causal=False), layer(z))
    with pytest.raises(ValueError, match="takes no mask"):
        layer(z, is_causal=True)


@pytest.mark.parametrize("weight", [ISTA(101).dictionary, Dictionary(101).weight])
def test_dictionaries_start_uniform_with_variance_two_over_d(weight):
    assert weight.abs().max() <= (6 / 101) ** 0.5
    assert weight.var().item() == pytest.approx(2 / 101, rel=0.03)


def test_steps_start_where_the_layer_says():
    class FromNormalised(EncoderLayer):
        starts_from_norm = True

    z = torch.randn(2, 5, 12)
    layer, other = EncoderLayer(12, 3), FromNormalised(12, 3)
    other.load_state_dict(layer.state_dict())
    assert not layer.starts_from_norm
    x = layer.norm1(z)
    torch.testing.assert_close(layer(z), layer.ista(layer.norm2(z + layer.attn(x))))
    torch.testing.assert_close(other(z), layer.ista(layer.norm2(x + layer.attn(x))))
    decoder = DecoderLayer(12, 3)
    half = decoder.dictionary(decoder.norm1(z))
    torch.testing.assert_close(decoder(z), half - decoder.attn(decoder.norm2(half)))
    assert not decoder.starts_from_norm
