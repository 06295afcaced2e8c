"""The attention that the models run is the reference implementation's, in value and in gradient."""

import pytest
import torch

from crate_mae.private_torch import FakeTensorMode
from crate_mae.theory import attention, attention_membership, derivatives, linear_ssa, mssa, orthonormal_bases, ssa
from crate_mae.theory.attention import SymmetricAttention, fused_ssa


def reference_ssa(w, scale):
    """softmax(s W W^T) W as it stands, differentiated by autograd: the oracle."""
    return torch.softmax(scale * (w @ w.mT), dim=-1) @ w


def naive_ssa(w, scale):
    """The same, token by token, with plain sums."""
    out = torch.zeros_like(w)
    for i in range(len(w)):
        weights = torch.stack([(scale * (w[i] * w[j]).sum()).exp() for j in range(len(w))])
        for j in range(len(w)):
            out[i] += weights[j] / weights.sum() * w[j]
    return out


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[1, 2 * 11**2 * 8, 10**7], ids=["one-per-piece", "two-per-piece", "one-piece"])
def piece(request, monkeypatch):
    """How the batch is cut up must not matter; 15 matrices in twos leave a rest."""
    monkeypatch.setattr(derivatives, "_PIECE_BYTES", request.param)


def projections(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradient(function, w, grad_out, scale):
    w = w.detach().requires_grad_()
    out = function(w, scale)
    (grad,) = torch.autograd.grad(out, w, grad_out)
    return out.detach(), grad


def test_membership_rows_are_distributions_by_hand():
    # Tokens 0 and 1 on a line, scale log 2: logits (0, 0) and (0, log 2).
    membership = attention_membership(torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0.6931471805599453)
    expected = torch.tensor([[1 / 2, 1 / 2], [1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(membership, expected, rtol=1e-14, atol=0)


def test_default_scale_is_one_over_root_p(generator):
    w = projections(3, 11, 7, generator=generator)
    torch.testing.assert_close(ssa(w), reference_ssa(w, 7**-0.5))
    torch.testing.assert_close(attention_membership(w), attention_membership(w, 7**-0.5))


def test_ssa_is_the_naive_loop(generator):
    w = projections(11, 7, generator=generator)
    torch.testing.assert_close(ssa(w, 0.3), naive_ssa(w, 0.3), rtol=1e-13, atol=1e-14)


def test_linear_ssa_by_hand():
    # Rows (1, 0) and (1, 2): W W^T = [[1, 1], [1, 5]].
    w = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[6.0, 6.0], [18.0, 30.0]], dtype=torch.float64)
    torch.testing.assert_close(linear_ssa(w, 3.0), expected)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("scale", [0.0, 0.3, 5.0])
def test_value_and_gradient_are_those_of_the_reference(scale, generator):
    w, grad_out = projections(15, 11, 7, generator=generator), projections(15, 11, 7, generator=generator)
    ours = value_and_gradient(SymmetricAttention.apply, w, grad_out, scale)
    oracle = value_and_gradient(reference_ssa, w, grad_out, scale)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.0, 0.3, 5.0])
def test_the_fused_form_has_those_of_the_reference_value_and_gradient(scale, generator):
    w, grad_out = projections(3, 5, 11, 7, generator=generator), projections(3, 5, 11, 7, generator=generator)
    ours = value_and_gradient(fused_ssa, w, grad_out, scale)
    oracle = value_and_gradient(reference_ssa, w, grad_out, 7**-0.5 if scale is None else scale)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, 1),
        ("cuda", torch.bfloat16, 1),
        ("cpu", torch.float64, 1),
        ("cpu", torch.float32, 1),
        ("cpu", torch.float16, 0),
        ("cpu", torch.bfloat16, 0),
    ],
)
def test_all_but_half_precision_on_a_processor_takes_the_fused_form(device, dtype, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "fused_ssa", lambda w, scale: calls.append(scale) or w)
    with FakeTensorMode():
        ssa(torch.empty(3, 11, 7, device=device, dtype=dtype), 0.3)
    assert len(calls) == expected


def test_the_fused_form_keeps_the_precision_of_its_input_under_autocast(generator):
    w = projections(3, 11, 7, generator=generator, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_ssa(w)
    torch.testing.assert_close(out, reference_ssa(w, 7**-0.5))


@pytest.mark.usefixtures("piece")
def test_gradcheck(generator):
    w = projections(3, 5, 3, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(SymmetricAttention.apply, (w, 0.7))


def test_views_and_expanded_gradients_are_handled(generator):
    # As in a model: heads are cut out of one tensor, and the sum of the output sends back an expanded gradient.
    flat = projections(3, 11, 5 * 7, generator=generator)
    w = flat.unflatten(-1, (5, 7)).transpose(1, 2)
    expanded = torch.ones((), dtype=w.dtype).expand(w.shape)
    oracle = value_and_gradient(reference_ssa, w, expanded, 0.3)
    ours = value_and_gradient(ssa, w, expanded, 0.3)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    ours = value_and_gradient(
        lambda w, scale: SymmetricAttention.apply(w.reshape(15, 11, 7), scale), w, expanded.reshape(15, 11, 7), 0.3
    )
    torch.testing.assert_close(ours[1], oracle[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_half_precisions_stay_close_to_the_exact_value_and_gradient(dtype, tolerance, spread, generator):
    # Spread 2 makes attention peaked, where a careless softmax gradient loses two digits to cancellation.
    w, grad_out = (projections(12, 65, 32, generator=generator, dtype=dtype) for _ in range(2))
    w = (spread * w).detach()
    ours = value_and_gradient(ssa, w, grad_out, 32**-0.5)
    exact = value_and_gradient(reference_ssa, w.double(), grad_out.double(), 32**-0.5)
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_large_projections_do_not_overflow():
    w = torch.full((2, 3, 64), 60.0, dtype=torch.float16)  # w w^T is 230400, beyond float16; s w w^T is 28800.
    torch.testing.assert_close(ssa(w), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_precision_in_which_projections_arrive(dtype, generator):
    w, grad_out = (projections(3, 11, 7, generator=generator, dtype=dtype) for _ in range(2))
    plain = value_and_gradient(ssa, w, grad_out, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradient(ssa, w, grad_out, 0.3)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


def test_only_projections_and_memberships_are_saved(generator):
    saved = []
    w = projections(3, 11, 7, generator=generator).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        SymmetricAttention.apply(w, 0.3)
    assert sum(x.numel() for x in saved) == w.numel() + 3 * 11 * 11


def test_nothing_is_saved_without_gradients(generator):
    out = ssa(projections(3, 11, 7, generator=generator))
    assert not out.requires_grad
    assert out.grad_fn is None


def test_a_second_derivative_is_refused_and_not_wrong(generator):
    w = projections(3, 11, 7, generator=generator).requires_grad_()
    out = SymmetricAttention.apply(w, 0.3)
    (grad,) = torch.autograd.grad(out.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_mssa_sums_its_heads(batch, generator):
    z, u = projections(*batch, 11, 7, generator=generator), projections(5, 7, 3, generator=generator)
    expected = sum(reference_ssa(z @ u_k, 3**-0.5) @ u_k.mT for u_k in u)
    torch.testing.assert_close(mssa(z, u), expected, rtol=1e-12, atol=1e-12)


def test_mssa_leaves_what_is_outside_the_subspaces_behind(generator):
    bases = orthonormal_bases(3, 17, 5, generator)
    inside, outside = bases[:2], bases[2]
    out = mssa(projections(11, 17, generator=generator), inside)
    torch.testing.assert_close(out @ outside, torch.zeros(11, 5, dtype=torch.float64), rtol=0, atol=1e-14)
