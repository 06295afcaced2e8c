"""The ISTA step is the official one in a single product, and it descends its lasso."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from crate_mae.theory import (
    apply_ista_operator,
    bounded_dictionary,
    ista_operator,
    ista_step,
    lasso_objective,
    scaled_gram,
    sparse_codes,
    top_singular_pair,
)


def official_ista_step(x, dictionary, step_size, threshold):
    """The three products of the official code, in its `linear` notation: the oracle."""
    x_dt = F.linear(x, dictionary)
    x_dt_d = F.linear(x_dt, dictionary.t())
    x_d = F.linear(x, dictionary.t())
    return F.relu(x + step_size * (x_d - x_dt_d) - step_size * threshold)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def gaussian(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def value_and_gradients(step, x, dictionary, grad_out, step_size=0.1, threshold=0.5):
    x, dictionary = x.detach().requires_grad_(), dictionary.detach().requires_grad_()
    out = step(x, dictionary, step_size, threshold)
    return out.detach(), *torch.autograd.grad(out, (x, dictionary), grad_out)


def test_operator_by_hand():
    # D = [[0, 1], [0, 2]]: D^T D = [[0, 0], [0, 5]], W = I + 0.1 ([[0, 1], [0, 2]] - [[0, 0], [0, 5]]).
    dictionary = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.1], [0.0, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(ista_operator(dictionary, 0.1), expected, rtol=1e-15, atol=0)


def test_step_by_hand():
    # X W = (2, 0.2 + 2.1) and (-3, -0.3 + 0.7) with the operator above; then 0.05 is taken off and the rest is cut.
    dictionary = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    x = torch.tensor([[2.0, 3.0], [-3.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[1.95, 2.25], [0.0, 0.35]], dtype=torch.float64)
    torch.testing.assert_close(ista_step(x, dictionary, 0.1, 0.5), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3, 5)])
def test_value_and_all_gradients_are_the_official_ones(batch, generator):
    x, grad_out = gaussian(*batch, 11, generator=generator), gaussian(*batch, 11, generator=generator)
    dictionary = gaussian(11, 11, generator=generator)
    ours = value_and_gradients(ista_step, x, dictionary, grad_out)
    oracle = value_and_gradients(official_ista_step, x, dictionary, grad_out)
    assert (oracle[0] == 0).any()
    assert (oracle[0] > 0).any()
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_operator_formed_once_gives_the_step(generator):
    x, dictionary = gaussian(5, 11, generator=generator), gaussian(11, 11, generator=generator)
    out = apply_ista_operator(x, ista_operator(dictionary, 0.1), 0.1 * 0.5)
    torch.testing.assert_close(out, ista_step(x, dictionary, 0.1, 0.5), rtol=0, atol=0)


def test_scaled_gram_and_its_first_and_second_derivatives_for_any_number_of_atoms(generator):
    dictionary = gaussian(4, 7, generator=generator).requires_grad_()
    weights = gaussian(7, 7, generator=generator)  # not symmetric: the gradient takes both halves of it
    gram = scaled_gram(dictionary, 0.1)
    torch.testing.assert_close(gram, 0.1 * dictionary.T @ dictionary, rtol=1e-14, atol=1e-15)
    (gradient,) = torch.autograd.grad((weights * gram).sum(), dictionary)
    torch.testing.assert_close(gradient, 0.1 * dictionary @ (weights + weights.T), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda d: scaled_gram(d, 0.1), dictionary)


def test_operator_under_autocast_errs_by_its_rounding_and_sends_gradients_in_float32(generator):
    dictionary = (gaussian(67, 67, generator=generator) * (2 / 67) ** 0.5).float().requires_grad_()
    grad_out = gaussian(67, 67, generator=generator)
    exact = ista_operator(dictionary.double(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ista_operator(dictionary, 0.1)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 2**-7 * exact.norm()
    (wanted,) = torch.autograd.grad(exact, dictionary, grad_out)
    (found,) = torch.autograd.grad(rounded, dictionary, grad_out.bfloat16())
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 2**-7 * wanted.norm()


def test_bfloat16_errs_by_its_own_rounding_only(generator):
    x = F.layer_norm(gaussian(5, 13, 67, generator=generator), (67,))
    dictionary = gaussian(67, 67, generator=generator) * (2 / 67) ** 0.5
    grad_out = gaussian(5, 13, 67, generator=generator)
    exact = value_and_gradients(official_ista_step, x, dictionary, grad_out)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(ista_step, x.float(), dictionary.float(), grad_out.bfloat16())
    for got, expected, tolerance in zip(ours, exact, (4e-3, 5e-2, 5e-2), strict=True):
        # Where a rounded entry crosses zero its gradient switches: that, not the products, is the looser bound.
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_lasso_objective_by_hand():
    # D = diag(1, 2): codes (3, 1) rebuild (3, 2). Residuals (1, 0) and (0, -2) of two tokens, mean of the two sums.
    dictionary = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    codes = torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[4.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    expected = ((0.5 + 0.7 * 4) + (2.0 + 0.7 * 1)) / 2
    assert lasso_objective(codes, x, dictionary, 0.7).item() == pytest.approx(expected, rel=1e-14)


def test_step_is_a_projected_gradient_step_on_the_lasso(generator):
    x, dictionary = gaussian(1, 11, generator=generator).abs(), gaussian(11, 11, generator=generator)
    codes = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lasso_objective(codes, x, dictionary, 0.5), codes)
    torch.testing.assert_close(ista_step(x, dictionary, 0.1, 0.5), F.relu(x - 0.1 * gradient), rtol=1e-12, atol=1e-12)


def lasso_change(seed, step_in_units_of_the_bound):
    """How one step from A = X >= 0 changes the objective of a single token, for a random problem."""
    generator = torch.Generator().manual_seed(seed)
    x, dictionary = gaussian(1, 7, generator=generator).abs(), gaussian(7, 7, generator=generator)
    threshold = torch.rand((), generator=generator).item()
    step_size = step_in_units_of_the_bound / torch.linalg.matrix_norm(dictionary, ord=2).item() ** 2
    codes = ista_step(x, dictionary, step_size, threshold)
    return (lasso_objective(codes, x, dictionary, threshold) - lasso_objective(x, x, dictionary, threshold)).item()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_step_within_the_bound_never_raises_the_lasso(fraction):
    assert all(lasso_change(seed, fraction) < 0 for seed in range(100))


def test_step_far_beyond_the_bound_raises_the_lasso():
    assert sum(lasso_change(seed, 20.0) > 0 for seed in range(100)) > 50


def test_sparse_codes_never_raise_the_objective_and_end_at_its_minimum(generator):
    dictionary, x = gaussian(7, 19, generator=generator), gaussian(11, 7, generator=generator)
    eta, lam = 1 / float(torch.linalg.matrix_norm(dictionary, 2)) ** 2, 0.3
    objectives = [lasso_objective(torch.zeros(11, 19, dtype=x.dtype), x, dictionary, lam)]
    tried = (sparse_codes(x, dictionary, eta, lam, steps) for steps in range(1, 9))
    objectives += [lasso_objective(codes, x, dictionary, lam) for codes in tried]
    assert all(after < before for before, after in pairwise(objectives))
    codes = sparse_codes(x, dictionary, eta, lam, 20_000)
    # Optimal where the gradient vanishes on the support and does not pull upwards off it.
    gradient = lam - (x - codes @ dictionary.T) @ dictionary
    assert gradient[codes > 0].abs().max() < 1e-6
    assert gradient[codes == 0].min() > -1e-6


def test_two_steps_written_out(generator):
    dictionary, x = gaussian(3, 5, generator=generator), gaussian(2, 3, generator=generator)
    first = torch.relu(0.1 * x @ dictionary - 0.05)
    second = torch.relu(first - 0.1 * (first @ dictionary.T @ dictionary - x @ dictionary) - 0.05)
    torch.testing.assert_close(sparse_codes(x, dictionary, 0.1, 0.5, 2), second)


def test_iterations_go_on_from_a_start():
    generator = torch.Generator().manual_seed(0)
    x, dictionary = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (11, 7))
    torch.testing.assert_close(sparse_codes(x, dictionary, 0.1, 0.2, 1, start=x), ista_step(x, dictionary, 0.1, 0.2))
    halfway = sparse_codes(x, dictionary, 0.1, 0.2, 3)
    torch.testing.assert_close(
        sparse_codes(x, dictionary, 0.1, 0.2, 2, start=halfway), sparse_codes(x, dictionary, 0.1, 0.2, 5)
    )


def test_the_largest_singular_value_and_its_gradient():
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    exact = torch.linalg.matrix_norm(d, ord=2)
    (expected,) = torch.autograd.grad(exact, d)
    for iterations, tolerance in ((None, 1e-10), (200, 1e-6)):
        u, v = top_singular_pair(d, iterations)
        norm = u @ (d @ v)
        torch.testing.assert_close(norm, exact, rtol=tolerance, atol=0)
        (found,) = torch.autograd.grad(norm, d)
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * tolerance**0.5)
    norms = [(lambda pair: pair.u @ (d @ pair.v))(top_singular_pair(d, n)) for n in (1, 2, 4, 8)]
    assert all(a < b <= exact for a, b in pairwise(norms))


def test_a_dictionary_is_scaled_down_and_never_up():
    d = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    norm = torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(bounded_dictionary(d, 0.25, norm), d / 2)
    torch.testing.assert_close(bounded_dictionary(d, 1 / 16, norm), d)
    torch.testing.assert_close(bounded_dictionary(d, 0.01, norm), d)
    zero = torch.zeros_like(d)
    assert torch.equal(bounded_dictionary(zero, 1.0, torch.zeros((), dtype=torch.float64)), zero)


@pytest.mark.parametrize("too_low", [1.0, 1.2, 1.4])
def test_a_step_of_a_bounded_dictionary_descends_by_as_much_as_it_promises(too_low):
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        d, eta, threshold = torch.randn(5, 9, generator=generator, dtype=torch.float64), 0.3, 0.2
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        start = torch.randn(6, 9, generator=generator, dtype=torch.float64).relu()
        d = bounded_dictionary(d, eta, torch.linalg.matrix_norm(d, ord=2) / too_low)
        length = torch.linalg.matrix_norm(d, ord=2)
        code = sparse_codes(x, d, eta, threshold, 1, start=start)
        promised = (1 / eta - length**2 / 2) * (code - start).square().sum(-1).mean()
        assert promised > 0
        before, after = (lasso_objective(a, x, d, threshold) for a in (start, code))
        assert after <= before - promised + 1e-12
