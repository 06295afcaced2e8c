"""The rates have the values, invariances and gradients that their formulas promise."""

import math

import numpy as np
import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.theory import (
    coding_rate,
    coding_rate_gradient,
    linear_ssa,
    moment_coding_rate,
    official_subspace_coding_rate,
    orthonormal_bases,
    project,
    projected_coding_rate,
    rate_reduction,
    sparse_rate_reduction,
    subspace_coding_rate,
    subspace_coding_rate_gradient,
    unproject,
)

EPS = 0.7
SHAPES = [(11, 7), (7, 11), (7, 7)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def gaussian(*shape, generator, scale=1.0):
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(d, generator):
    return torch.linalg.qr(gaussian(d, d, generator=generator)).Q


def rate_by_eigenvalues(z, a):
    """1/2 sum log(1 + a lambda_i) over the eigenvalues of Z Z^T, by numpy and on the n x n side always."""
    z = z.numpy()
    return 0.5 * np.log1p(a * np.linalg.eigvalsh(z @ z.T).clip(min=0)).sum()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_coding_rate_is_the_log_volume_of_the_eigenvalues(n, d, generator):
    z = gaussian(2, 3, n, d, generator=generator)
    rates = coding_rate(z, EPS)
    assert rates.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert rates[i, j].item() == pytest.approx(rate_by_eigenvalues(z[i, j], d / (n * EPS**2)), rel=1e-12)


def test_coding_rate_of_orthogonal_rows_by_hand():
    # Rows 3 e_1 and 4 e_2 in R^5, eps = 1/2: a = 5 / (2 / 4) = 10, so R = 1/2 (log 91 + log 161).
    z = torch.zeros(2, 5, dtype=torch.float64)
    z[0, 0], z[1, 1] = 3, 4
    assert coding_rate(z, 0.5).item() == pytest.approx(0.5 * (math.log(91) + math.log(161)), rel=1e-14)


def test_subspace_coding_rate_by_hand():
    # Three tokens in R^7 and two planes, span(e_1, e_2) and span(e_3, e_4): a = 2 / (3 / 4) = 8/3.
    # W_1 has the rows (3, 0), (0, 1), 0: 1 + 9 a = 25 and 1 + a = 11/3. W_2 has the rows 0, 0, (0, 2): 1 + 4 a = 35/3.
    z = torch.zeros(3, 7, dtype=torch.float64)
    z[0, 0], z[1, 1], z[2, 3], z[2, 6] = 3, 1, 2, 100
    u = torch.eye(7, dtype=torch.float64)[:, :4].reshape(7, 2, 2).transpose(0, 1)
    expected = 0.5 * (math.log(25) + math.log(11 / 3) + math.log(35 / 3))
    assert subspace_coding_rate(z, u, 0.5).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("n", "p"), [(11, 3), (2, 3)])
def test_subspace_coding_rate_sums_the_rates_of_the_projections(n, p, generator):
    z, u = gaussian(2, n, 7, generator=generator), gaussian(5, 7, p, generator=generator)
    rates = subspace_coding_rate(z, u, EPS)
    expected = [sum(rate_by_eigenvalues(z_i @ u_k, p / (n * EPS**2)) for u_k in u) for z_i in z]
    np.testing.assert_allclose(rates.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(projected_coding_rate(project(z, u), EPS), rates)


def test_official_rate_is_the_official_formula(generator):
    b, h, n, p, e = 2, 3, 11, 5, 0.01
    w = gaussian(b, h, n, p, generator=generator)
    unit = w / w.square().sum(-1, keepdim=True).sqrt()
    gram = torch.einsum("bhnp,bhmp->bhnm", unit, unit)
    expected = torch.logdet(torch.eye(n, dtype=torch.float64) + p / (n * e) * gram).sum(1) / 2
    torch.testing.assert_close(official_subspace_coding_rate(w), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(official_subspace_coding_rate(17 * w), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e3])
def test_rates_are_not_negative(n, d, scale, generator):
    z, u = gaussian(5, n, d, generator=generator, scale=scale), gaussian(2, d, 3, generator=generator)
    assert (coding_rate(z, EPS) >= 0).all()
    assert (subspace_coding_rate(z, u, EPS) >= 0).all()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rates_are_invariant_to_rotations_and_permutations(n, d, generator):
    z, u = gaussian(n, d, generator=generator), gaussian(2, d, 3, generator=generator)
    q, order = rotation(d, generator), torch.randperm(n, generator=generator)
    moved = z[order] @ q
    torch.testing.assert_close(coding_rate(moved, EPS), coding_rate(z, EPS))
    torch.testing.assert_close(subspace_coding_rate(moved, q.mT @ u, EPS), subspace_coding_rate(z, u, EPS))
    basis_change = rotation(3, generator)
    torch.testing.assert_close(subspace_coding_rate(z, u @ basis_change, EPS), subspace_coding_rate(z, u, EPS))


def test_subspace_rate_is_not_invariant_when_only_the_tokens_rotate(generator):
    z, u = gaussian(11, 7, generator=generator), orthonormal_bases(2, 7, 3, generator)
    assert not torch.isclose(subspace_coding_rate(z @ rotation(7, generator), u), subspace_coding_rate(z, u), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", [0.0, 1.0, 300.0])
def test_rates_of_degenerate_tokens_are_exact_in_every_precision(dtype, fill):
    n, d, p = 13, 11, 5
    z = torch.full((n, d), fill, dtype=dtype)
    rate, gradient = coding_rate(z), coding_rate_gradient(z)
    # n equal rows are one direction with eigenvalue n d fill^2, so that a n d fill^2 = (2 d fill)^2 at eps = 1/2.
    assert rate.dtype == gradient.dtype == torch.float32
    assert rate.item() == pytest.approx(0.5 * math.log1p((2 * d * fill) ** 2), rel=1e-6)
    assert gradient.isfinite().all()
    w = torch.full((2, n, p), fill, dtype=dtype)
    along = 100 * p if fill else 0
    assert official_subspace_coding_rate(w).item() == pytest.approx(math.log1p(along), rel=1e-6)


def test_rates_ignore_autocast(generator):
    z, u = gaussian(11, 7, generator=generator).float(), orthonormal_bases(2, 7, 3, generator).float()
    outside = coding_rate(z), subspace_coding_rate(z, u), subspace_coding_rate_gradient(z, u)
    with torch.autocast("cpu", torch.bfloat16):
        inside = coding_rate(z), subspace_coding_rate(z, u), subspace_coding_rate_gradient(z, u)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_rates_of_non_finite_tokens_are_nan():
    z = torch.zeros(5, 7)
    z[2, 3] = math.inf
    assert coding_rate(z).isnan()
    assert coding_rate_gradient(z).isnan().any()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_gradient_of_the_coding_rate_is_autograds(n, d, generator):
    z = gaussian(2, n, d, generator=generator).requires_grad_()
    (expected,) = torch.autograd.grad(coding_rate(z, EPS).sum(), z)
    torch.testing.assert_close(coding_rate_gradient(z.detach(), EPS), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("n", "p"), [(11, 3), (2, 3)])
def test_gradient_of_the_subspace_rate_is_autograds(n, p, generator):
    z, u = gaussian(2, n, 7, generator=generator).requires_grad_(), gaussian(5, 7, p, generator=generator)
    (expected,) = torch.autograd.grad(subspace_coding_rate(z, u, EPS).sum(), z)
    torch.testing.assert_close(subspace_coding_rate_gradient(z.detach(), u, EPS), expected, rtol=1e-11, atol=1e-13)


def contracting_tokens(n, u, spectral_norm, generator):
    """Tokens with max_k a ||W_k||_2^2 equal to the given number, below 1 for the series to converge."""
    z = gaussian(n, u.shape[1], generator=generator)
    a = u.shape[2] / (n * EPS**2)
    largest = torch.linalg.matrix_norm(project(z, u), ord=2).max()
    return z * (spectral_norm / a) ** 0.5 / largest, a


def test_neumann_orders_converge_to_autograds_gradient_at_the_stated_rate(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    norm = 0.5
    z, _ = contracting_tokens(11, u, norm, generator)
    z.requires_grad_()
    (exact,) = torch.autograd.grad(subspace_coding_rate(z, u, EPS), z)
    errors = [(subspace_coding_rate_gradient(z.detach(), u, EPS, m) - exact).norm() / exact.norm() for m in range(12)]
    for order, error in enumerate(errors):
        # The remainder of the series is (-a W W^T)^(m + 1) times the exact sum.
        assert error <= norm ** (order + 1) * (1 + 1e-9)
        assert order == 0 or error < errors[order - 1]


def test_neumann_series_diverges_beyond_its_radius(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    z, _ = contracting_tokens(11, u, 2.0, generator)
    exact = subspace_coding_rate_gradient(z, u, EPS)
    errors = [(subspace_coding_rate_gradient(z, u, EPS, m) - exact).norm() for m in (4, 8, 16)]
    assert errors[0] < errors[1] < errors[2]


def test_softmax_free_attention_is_the_first_order_gradient(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    z, a = contracting_tokens(11, u, 0.01, generator)
    w = project(z, u)
    attention_form = a * unproject(w - linear_ssa(w, a), u)
    torch.testing.assert_close(subspace_coding_rate_gradient(z, u, EPS, 1), attention_form, rtol=1e-13, atol=1e-15)
    z.requires_grad_()
    (exact,) = torch.autograd.grad(subspace_coding_rate(z, u, EPS), z)
    assert (attention_form - exact).norm() <= 1e-4 * exact.norm()
    assert (a * unproject(w, u) - exact).norm() > 1e-4 * exact.norm()


def test_a_gradient_step_compresses(generator):
    z, u = gaussian(11, 17, generator=generator), orthonormal_bases(3, 17, 5, generator)
    moved = z - 0.1 * subspace_coding_rate_gradient(z, u)
    assert subspace_coding_rate(moved, u) < subspace_coding_rate(z, u)


def test_negative_neumann_order_is_refused(generator):
    with pytest.raises(UserError, match="neumann_order=-1"):
        subspace_coding_rate_gradient(torch.zeros(5, 7), torch.zeros(2, 7, 3), neumann_order=-1)


def test_the_rate_of_a_moment_is_that_of_its_tokens_and_pools_images(generator):
    z = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    moments = z.mT @ z / 7
    torch.testing.assert_close(moment_coding_rate(moments, EPS), coding_rate(z, EPS))
    torch.testing.assert_close(moment_coding_rate(moments.mean(0), EPS), coding_rate(z.flatten(0, 1), EPS))


def test_rate_reduction_and_its_sparse_form_are_their_differences(generator):
    z, u = gaussian(2, 11, 7, generator=generator), orthonormal_bases(2, 7, 3, generator)
    z[0, :, 2] = 0
    reduction = coding_rate(z, EPS) - subspace_coding_rate(z, u, EPS)
    torch.testing.assert_close(rate_reduction(z, u, EPS), reduction)
    count = torch.tensor([66.0, 77.0], dtype=torch.float64)
    torch.testing.assert_close(sparse_rate_reduction(z, u, EPS, 0.3), reduction - 0.3 * count)
    magnitude = z.abs().sum((1, 2))
    torch.testing.assert_close(sparse_rate_reduction(z, u, EPS, 0.3, "l1"), reduction - 0.3 * magnitude)


def test_rate_reduction_is_larger_for_tokens_on_different_subspaces(generator):
    u = orthonormal_bases(2, 17, 5, generator)
    codes = gaussian(2, 11, 5, generator=generator)
    spread = torch.cat([codes[0] @ u[0].mT, codes[1] @ u[1].mT])
    together = torch.cat([codes[0] @ u[0].mT, codes[1] @ u[0].mT])
    assert rate_reduction(spread, u) > rate_reduction(together, u)


@pytest.mark.parametrize(("n", "d"), [(11, 7), (7, 11)])
@pytest.mark.parametrize(("scale", "error"), [(1e-4, 1e-5), (1.0, 1e-5), (1e2, 1e-5), (1e4, 1e-3)])
def test_rates_of_rank_deficient_float32_tokens_are_those_of_float64(n, d, scale, error, generator):
    """Rank 2, plus noise of the size of float32's rounding: a determinant in float32 would be that of the noise.

    At the last scale the condition number, 1e15, is at the end of what float64 resolves.
    """
    z = gaussian(3, n, 2, generator=generator) @ gaussian(2, d, generator=generator) * scale
    u = gaussian(2, d, 3, generator=generator).float()
    single = z.float()
    exact = single.double().numpy()
    rates, subspace_rates = coding_rate(single, 0.01), subspace_coding_rate(single, u, 0.01)
    assert rates.dtype == torch.float32 and rates.isfinite().all()
    for i, z_i in enumerate(exact):
        sigma = np.linalg.svd(z_i, compute_uv=False)
        assert rates[i].item() == pytest.approx(0.5 * np.log1p(d / (n * 1e-4) * sigma**2).sum(), rel=error)
        sigma = [np.linalg.svd(z_i @ u_k.double().numpy(), compute_uv=False) for u_k in u]
        expected = 0.5 * np.log1p(3 / (n * 1e-4) * np.square(sigma)).sum()
        assert subspace_rates[i].item() == pytest.approx(expected, rel=error)
