"""The counted operations are those that are computed, and a trial step changes only its own model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crate_mae.comparison.entries import seconds_in_turns
from crate_mae.costs.trial import StepSettings, TrialStep, flop_counter, step_flops
from crate_mae.models import create_model
from crate_mae.private_torch import TorchDispatchMode
from crate_mae.theory.attention import SymmetricAttention, ssa
from crate_mae.theory.sparse_coding import ista_step
from tests.costs.models import EVERY_KIND

CPU = torch.device("cpu")
B, N, P = 3, 7, 5


def settings(**changes):
    values = {"batch_size": 3, "mask_ratio": 0.75, "weight_decay": 0.05, "clip_grad": 1.0, "precision": "float32"}
    return StepSettings(**{**values, **changes})


def config(name, **changes):
    changes = {"in_chans": 1, "embed_dim": 20, "num_heads": 5, "depth": 2, "decoder_depth": 1, **changes}
    return create_model(name, **changes).config


def forward_and_backward(function, *shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with flop_counter() as forward:
        output = function(*inputs)
    with flop_counter() as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def symmetric(w):
    return SymmetricAttention.apply(w, 0.3)


def test_our_attention_is_counted_forward_and_backward():
    product = 2 * B * N * N * P
    forward, backward = forward_and_backward(symmetric, (B, N, P))
    assert forward == 2 * product  # W W^T, P W
    assert backward == 4 * product  # dO W^T, P^T dO, dS W, dS^T W


def test_fused_attention_is_counted_forward_and_backward():
    product = 2 * 2 * B * N * N * P
    forward, backward = forward_and_backward(ssa, (2, B, N, P))
    assert forward == 2 * product
    assert backward == 5 * product  # W W^T again


def test_torch_alone_misses_half_of_our_backward_pass():
    w = torch.randn(B, N, P, requires_grad=True)
    output = symmetric(w).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    # When this fails, torch counts `baddbmm_` itself, and `flop_counter` need not.
    assert counter.get_total_flops() == 2 * 2 * B * N * N * P


def test_torch_alone_misses_the_fused_attention_of_processors():
    with FlopCounterMode(display=False) as counter:
        ssa(torch.randn(2, B, N, P))
    assert counter.get_total_flops() == 0


def test_attention_in_pieces_is_counted_like_attention_at_once(monkeypatch):
    whole = forward_and_backward(symmetric, (B, N, P))
    monkeypatch.setattr("crate_mae.theory.derivatives._PIECE_BYTES", 2 * N * N * 4)
    assert forward_and_backward(symmetric, (B, N, P)) == whole


def test_an_ista_step_is_counted_forward_and_backward():
    tokens, square = 2 * B * N * P * P, 2 * P**3
    forward, backward = forward_and_backward(lambda x, d: ista_step(x, d, 0.1, 0.5), (B, N, P), (P, P))
    assert forward == tokens + square  # X W, D^T D
    assert backward == 2 * tokens + square  # G W^T, X^T G, D (dW + dW^T)


def test_the_flops_of_a_crate_encoder_are_those_of_its_formula():
    c = config("crate_mae_nano_patch2_8")
    b, m, d, n, q = 3, 17, 20, 16, 4
    embedding = 2 * b * n * q * d
    layer = 3 * 2 * b * m * d * d + 2 * 2 * b * m * m * d + 2 * d**3
    assert TrialStep(c, settings(batch_size=b), CPU).encoder_flops() == embedding + c.depth * layer


def test_the_flops_of_a_vit_encoder_are_those_of_its_formula():
    c = config("vit_mae_nano_patch2_8")
    b, m, d, n, q = 3, 17, 20, 16, 4
    embedding = 2 * b * n * q * d
    layer = (4 + 8) * 2 * b * m * d * d + 2 * 2 * b * m * m * d
    assert TrialStep(c, settings(batch_size=b), CPU).encoder_flops() == embedding + c.depth * layer


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])
def test_every_matrix_product_of_a_training_step_is_counted(name, precision):
    step = TrialStep(config(name), settings(precision=precision), CPU)
    with Operations() as operations:
        step.loss().backward()
    products = {
        op for op in operations.seen if any(word in str(op) for word in ("mm", "conv", "attention", "mv", "dot"))
    }
    assert len(products) >= 4
    assert products <= set(flop_counter().flop_registry)


def test_training_costs_about_three_times_the_forward_pass():
    c = config("crate_mae_nano_patch2_8", decoder_depth=2)
    step = TrialStep(c, settings(), CPU)
    with torch.no_grad(), flop_counter() as forward:
        step.model(step.images, mask=step.mask)
    # A product has two more in its backward pass. Fused attention has five for its two: it forms its weights again.
    assert 2.5 < step.training_flops() / forward.get_total_flops() < 3.5


def test_a_trial_step_changes_weights_and_nothing_else():
    c = config("crate_mae_nano_patch2_8")
    before = torch.get_rng_state()
    step = TrialStep(c, settings(), CPU)
    weights = step.model.mask_token.detach().clone()
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    assert step() > 0
    assert not torch.equal(step.model.mask_token, weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_are_timed_in_turns():
    order = []

    def trial(name, seconds):
        def step():
            order.append(name)
            return seconds

        return step

    assert seconds_in_turns([trial("a", 0.5), trial("b", 0.25)]) == [0.5, 0.25]
    assert order[:4] == ["a", "a", "b", "b"]  # warming up
    assert order[4:] == ["a", "b"] * ((len(order) - 4) // 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_operations_are_extrapolated_exactly(name, precision):
    c = config(name, depth=3, decoder_depth=4)
    s = settings(batch_size=5, precision=precision)
    step = TrialStep(c, s, CPU)
    whole = (*step.forward_flops(), step.training_flops())
    assert step_flops(c, s) == whole
