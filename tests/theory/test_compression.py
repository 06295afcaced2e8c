"""Compression is a theorem: no rate rises, whatever the tokens; and the fast forms are the plain one."""

import pytest
import torch

from crate_mae.theory import derivatives
from crate_mae.theory.attention import attention_membership
from crate_mae.theory.coding_rate import projected_coding_rate
from crate_mae.theory.compression import (
    balance,
    balanced_membership,
    balanced_ssa,
    compression_step,
    decompression_step,
    fused_balanced_ssa,
    symmetric_membership,
)

MEMBERSHIPS = {"balanced": balanced_membership, "symmetric": symmetric_membership}
EPS = (0.01, 0.5, 20.0)
ROUNDING = 1e-9  # of a logdet whose matrix has a condition number of up to 1e8


def tokens(kind, times, n, p, generator):
    """Projections that are hard on a step, `times` of them: see the names of `KINDS`."""
    w = torch.randn(times, n, p, generator=generator, dtype=torch.float64)
    if kind == "lengths spread over e^4":
        return w * torch.exp(4 * torch.rand(times, n, 1, generator=generator, dtype=torch.float64) - 2)
    if kind == "large common part":
        return w + 5 * torch.randn(times, 1, p, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        return w.gather(1, torch.randint(n, (times, n, 1), generator=generator).expand(-1, -1, p))
    if kind == "one long token":
        return torch.cat([30 * w[:, :1], w[:, 1:]], dim=1)
    return w


KINDS = ("plain", "lengths spread over e^4", "large common part", "duplicates", "one long token")
SIZES = [(1, 3), (2, 5), (3, 11), (17, 7), (29, 2)]


def cases(times=200):
    """5,000 projections in 25 batches, an inverse temperature from 1/50 to 50 times p^-1/2 and a kappa for each."""
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        for n, p in SIZES:
            exponent, rate = torch.rand(2, times, 1, 1, generator=generator, dtype=torch.float64)
            yield tokens(kind, times, n, p, generator), 50 ** (2 * exponent - 1) / p**0.5, rate


def rate_of(w, eps):
    return projected_coding_rate(w.unsqueeze(-3), eps)


@pytest.mark.parametrize("membership", MEMBERSHIPS.values(), ids=MEMBERSHIPS)
def test_no_rate_and_no_singular_value_rises(membership):
    for w, scale, kappa in cases():
        mixed = membership(w, scale) @ w
        for size in (kappa, 1.0):
            after = compression_step(w, mixed, size)
            before = torch.linalg.svdvals(w)
            assert (torch.linalg.svdvals(after) <= before * (1 + 1e-12) + 1e-12 * before[:, :1]).all()
            for eps in EPS:
                assert (rate_of(after, eps) <= rate_of(w, eps) * (1 + ROUNDING)).all()


@pytest.mark.parametrize("membership", MEMBERSHIPS.values(), ids=MEMBERSHIPS)
def test_the_reverse_step_lowers_no_rate_and_no_singular_value(membership):
    for w, scale, kappa in cases():
        mixed = membership(w, scale) @ w
        for size in (kappa, 1.0, 3.0):
            after = decompression_step(w, mixed, size)
            before = torch.linalg.svdvals(w)
            assert (torch.linalg.svdvals(after) >= before * (1 - 1e-12) - 1e-12 * before[:, :1]).all()
            for eps in EPS:
                assert (rate_of(after, eps) >= rate_of(w, eps) * (1 - ROUNDING)).all()


def test_the_softmax_has_no_such_guarantee():
    # Why this file exists: of two tokens the long one is hardly moved, and the short one grows into it.
    w = torch.tensor([[4.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    softmax = compression_step(w, attention_membership(w, 1.0) @ w, 0.5)
    balanced = compression_step(w, balanced_membership(w, 1.0) @ w, 0.5)
    assert torch.linalg.svdvals(softmax)[0] > 1.03 * torch.linalg.svdvals(w)[0]
    assert torch.linalg.svdvals(balanced)[0] < torch.linalg.svdvals(w)[0]
    eps = 20.0
    assert rate_of(softmax, eps) > 1.03 * rate_of(w, eps)
    raised = [
        rate_of(compression_step(w, attention_membership(scale**0.5 * w, 1.0) @ w, kappa), 0.5) / rate_of(w, 0.5)
        for w, scale, kappa in cases()
    ]
    assert sum(int((ratio > 1).sum()) for ratio in raised) > 250  # of 5,000, and by much more than rounding:
    assert max(float(ratio.max()) for ratio in raised) > 1.01


def test_a_balanced_matrix_is_a_contraction_whatever_it_is_made_of():
    generator = torch.Generator().manual_seed(1)
    for spread in (0.1, 1.0, 30.0, 1000.0):
        b = balance(spread * torch.randn(50, 13, 13, generator=generator, dtype=torch.float64))
        assert (torch.linalg.matrix_norm(b, ord=2) <= 1 + 1e-12).all()
    assert torch.linalg.matrix_norm(b, ord=2).max() > 0.99


def test_memberships_by_hand():
    # Tokens 0 and 1 on a line, scale log 2: affinities exp(S) = (1, 1; 1, 2), softmax (1/2, 1/2; 1/3, 2/3).
    w, scale = torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0.6931471805599453
    symmetric = torch.tensor([[1 / 2, 1 / 6**0.5], [1 / 6**0.5, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(symmetric_membership(w, scale), symmetric, rtol=1e-14, atol=0)
    columns = torch.tensor([5 / 6, 7 / 6], dtype=torch.float64).sqrt()
    softmax = torch.tensor([[1 / 2, 1 / 2], [1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(balanced_membership(w, scale), softmax / columns, rtol=1e-14, atol=0)


def test_the_symmetric_membership_has_eigenvalues_from_0_to_1():
    for w, scale, _ in cases(times=25):
        values = torch.linalg.eigvalsh(symmetric_membership(w, scale))
        assert values.min() >= -1e-12
        torch.testing.assert_close(values[:, -1], torch.ones(25, dtype=torch.float64))


def test_the_reverse_is_the_inverse_to_first_order():
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    b = balanced_membership(w, 0.3)
    errors = []
    for kappa in (0.04, 0.02, 0.01):
        there = compression_step(w, b @ w, kappa)
        errors.append(float((decompression_step(there, b @ there, kappa) - w).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def plain(w, scale):
    """The formula, differentiated by autograd."""
    return balanced_membership(w, scale) @ w


def value_and_gradients(function, w, scale, grad_out):
    w, scale = w.detach().requires_grad_(), scale.detach().requires_grad_()
    out = function(w, scale)
    return out.detach(), *torch.autograd.grad(out, (w, scale), grad_out)


@pytest.mark.parametrize("piece", [1, 2 * 11**2 * 8, 10**7], ids=["one-per-piece", "two-per-piece", "one-piece"])
@pytest.mark.parametrize("form", [balanced_ssa, fused_balanced_ssa])
def test_fast_forms_are_the_plain_one_with_its_gradients(form, piece, monkeypatch):
    monkeypatch.setattr(derivatives, "_PIECE_BYTES", piece)
    generator = torch.Generator().manual_seed(3)
    w, grad_out = (torch.randn(5, 3, 11, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(3, 1, 1, generator=generator, dtype=torch.float64) + 0.1
    expected = value_and_gradients(plain, w, scale, grad_out)
    for found, wanted in zip(value_and_gradients(form, w, scale, grad_out), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_full_and_nothing_overflows():
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(2, 3, 19, 8, generator=generator)
    half = w.to(torch.bfloat16)
    scale = torch.full((3, 1, 1), 0.4)
    exact = balanced_membership(half.double(), scale.double()) @ half.double()
    assert balanced_ssa(half, scale).dtype == torch.bfloat16
    torch.testing.assert_close(balanced_ssa(half, scale).double(), exact, rtol=2**-8, atol=1e-6)  # one rounding
    # Affinities of up to 10,000, of which no exponential exists in any precision.
    for form in (balanced_ssa, fused_balanced_ssa):
        long = (60 * w).half().requires_grad_()
        out = form(long, scale)
        out.float().square().sum().backward()
        assert out.isfinite().all()
        assert long.grad.isfinite().all()
    assert symmetric_membership(60 * w, scale).isfinite().all()


def test_the_fused_form_contracts_as_it_rounds():
    w = torch.tensor([[[27.0], [27.125]]], dtype=torch.bfloat16)
    mixed = fused_balanced_ssa(w, 0.125)
    assert mixed.double().norm() <= w.double().norm() * (1 + 2**-9)
