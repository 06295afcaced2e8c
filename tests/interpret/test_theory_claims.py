"""The claims of the theory: properties that hold for every draw, and known numbers."""

import json
import math

import pytest
import torch

from crate_mae.interpret.claims import attention, denoising, diffusion, ista, signal_to_noise
from crate_mae.interpret.claims.attention import softmax_steps, tilt_bases
from crate_mae.interpret.claims.common import Spread, cosine, relative_error, spreads
from crate_mae.interpret.claims.ista import STEPS, lasso_solution
from crate_mae.interpret.claims.report import measure_theory
from crate_mae.interpret.claims.signal_to_noise import attention_layer
from crate_mae.theory import coherence, orthonormal_bases, orthonormality_error
from crate_mae.theory import signal_to_noise as signal_to_noise_of


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_spreads_by_hand():
    rows = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}]
    assert spreads(rows) == {"a": Spread(2.0, 1.0), "b": Spread(2.0, 0.0)}
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert cosine(x, y) == pytest.approx(0.6)
    assert relative_error(x, y) == pytest.approx(0.8)


def test_the_denoiser_projects_best_and_each_token_alone_comes_nearest():
    results = denoising.measure(0, 2, noise=(0.1, 0.3), dimensions=(64,), subspaces=(4,))
    assert [point.noise_std for point in results.by_noise] == [0.1, 0.3]
    for point in (*results.by_noise, *results.by_dimension, *results.by_subspaces):
        assert point.error["denoiser"].mean == min(spread.mean for spread in point.error.values())
        assert point.cosine["token"].mean > point.cosine["all"].mean + 0.2
        assert all(-1 <= spread.mean <= 1 for spread in point.cosine.values())
    # Noise of variance sigma^2 in 32 - 8 of 32 dimensions, signal of variance 1 in 8.
    for point in results.by_noise:
        outside, inside = 24 * point.noise_std**2, 8 * (1 + point.noise_std**2)
        assert point.error["noisy"].mean == pytest.approx(math.sqrt(outside / (outside + inside)), rel=0.05)


def test_the_gradient_leaves_noise_outside_all_subspaces():
    (point,) = denoising.measure(0, 1, noise=(0.1,), dimensions=(128,), subspaces=(2,)).by_dimension
    assert point.error["token"].mean > 0.9 * point.error["noisy"].mean
    assert point.error["attention"].mean < 0.5 * point.error["noisy"].mean


def test_an_order_of_the_series_errs_by_the_next_power():
    results = attention.measure(0, 2, radii=(0.01, 0.1, 3.0))
    for points in (results.orthogonal, results.coherent):
        for order in range(3):
            small, large, beyond = (point.error[f"order {order}"].mean for point in points)
            assert large / small == pytest.approx(10 ** (order + 1), rel=0.2)
            assert beyond > 1
    assert results.orthogonal[0].coherence.mean < 1e-12 < 0.05 < results.coherent[0].coherence.mean
    assert results.orthogonal[0].mixing["order 1"].mean == pytest.approx(1, abs=1e-3)


def test_steps_by_hand():
    # In R^2 with the two axes for subspaces: tokens (1, 0) and (-1, 0) are 1 and -1 in the first and 0 in the second.
    u = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1)
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    steps = softmax_steps(z, u)
    attended = math.tanh(1)  # softmax of (1, -1), times (1, -1): the same for both scales, since p = 1
    for scale in ("s = 1", "s = p^-1/2"):
        torch.testing.assert_close(steps[f"published, {scale}"], attended * z)
        torch.testing.assert_close(steps[f"restored, {scale}"], (attended - 1) * z)


def test_the_restored_step_goes_downhill_and_the_published_one_uphill():
    results = attention.measure(0, 2, radii=(0.01, 0.3, 3.0))
    for point in (*results.orthogonal, *results.coherent):
        for scale in ("s = 1", "s = p^-1/2"):
            restored, published = f"restored, {scale}", f"published, {scale}"
            assert point.descent[published].mean < -0.5 < 0.3 < point.descent[restored].mean
            assert point.descent[restored].mean == pytest.approx(point.cosine[f"softmax, {scale}"].mean)
            # Of the same length, no step lowers R^c by more than the gradient's own, and the published one raises it.
            assert point.change["gradient"].mean < point.change[restored].mean < 0 < point.change[published].mean
            # What does not see length falls with both, and with the restored step of s = 1 by more.
            assert point.official_change[restored].mean < 0
            assert point.official_change[published].mean < 0
    assert results.orthogonal[1].descent["restored, s = p^-1/2"].mean == pytest.approx(0.94, abs=0.02)
    assert results.orthogonal[1].descent["published, s = p^-1/2"].mean == pytest.approx(-0.80, abs=0.02)


def test_tilted_bases_stay_orthonormal(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    tilted = tilt_bases(u, 0.05, generator)
    assert orthonormality_error(tilted) < 1e-12
    assert coherence(u) < 1e-12 < 0.05 < coherence(tilted)
    torch.testing.assert_close(tilt_bases(u, 0.0, generator), u)


def test_tokens_that_attend_to_themselves_gain_the_predicted_factor():
    # In R^4 with the planes (e_1, e_2) and (e_3, e_4): long tokens far apart, and little in the other plane.
    u = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2).transpose(0, 1)
    z = torch.tensor([[5.0, 0, 0.1, 0], [0, 5.0, 0, 0.1], [-5.0, 0, 0, -0.1]], dtype=torch.float64)
    after = attention_layer(z, u, "threshold", 0.5, 0.6)
    ratio = signal_to_noise_of(after, u)[0] / signal_to_noise_of(z, u)[0]
    assert ratio.item() == pytest.approx(1.3, rel=1e-12)
    torch.testing.assert_close(after[:, :2], 1.3 * z[:, :2])
    torch.testing.assert_close(after[:, 2:], z[:, 2:])


def test_the_constant_factor_holds_where_noise_is_small_and_ends_where_it_is_not():
    results = signal_to_noise.measure(0, 1, noise=(0.1, 1.0), layers=4)
    held = {(curve.operator, curve.noise_std): curve.layers_held for curve in results.curves}
    assert held["normalised", 0.1] == 4
    assert held["normalised", 1.0] == held["threshold", 1.0] == held["network", 0.1] == 0
    for curve in results.curves:
        product = math.prod(factor.mean for factor in curve.factor)
        assert curve.ratio[-1].mean / curve.ratio[0].mean == pytest.approx(product)


def test_diffusion_structures_single_tokens_and_returns():
    alone, together, oblique, space = diffusion.measure(0, 2, tokens=40).runs
    for run in (alone, space):
        assert run.forward[-1].mean < 0.7 * run.forward[0].mean
        assert run.distance[-1].mean < 0.5 * run.distance[0].mean
        assert run.reverse[-1].mean == pytest.approx(run.forward[0].mean, rel=0.15)
    assert together.forward[-1].mean == pytest.approx(together.forward[0].mean, rel=0.1)
    assert oblique.forward[-1].mean > oblique.forward[0].mean
    assert oblique.coherence == pytest.approx(0.5)
    for run in (alone, together, oblique, space):
        coarse, middle, fine = (spread.mean for spread in run.missed.values())
        assert fine < 0.5 * middle < 0.25 * coarse
        assert len(run.paths) == 2 * run.steps + 1
        assert len(run.paths[0]) == 40


def test_the_reference_solves_the_lasso(generator):
    # Its optimality conditions: no descent along active codes, none into the allowed side of the others.
    x, dictionary = (torch.randn(n, 17, generator=generator, dtype=torch.float64) for n in (11, 17))
    codes = lasso_solution(x, dictionary, 0.3)
    gradient = (codes @ dictionary.mT - x) @ dictionary + 0.3
    assert (codes >= 0).all()
    assert 0 < (codes > 0).double().mean() < 1
    assert gradient[codes > 0].abs().max() < 1e-6
    assert gradient.min() > -1e-6


def test_ista_reaches_the_minimum_unless_its_steps_are_too_long():
    results = ista.measure(0, 1, tokens=11)
    assert results.steps == STEPS
    for curve in results.curves:
        if curve.step_size <= 1:
            assert not curve.raises
            assert 0 <= curve.gap[-1].mean < 1e-3
            assert curve.support[-1].mean > 0.95
            assert curve.gap[0].mean < results.initial_gap[curve.start].mean
        if curve.step_size > 2:
            assert curve.raises
            assert curve.gap[-1].mean > 1e3


def test_the_numbers_depend_on_the_seed_alone():
    for measure in (ista.measure, attention.measure):
        once, again, other = (measure(seed, 1) for seed in (0, 0, 1))
        assert once == again != other


def test_all_numbers_are_in_the_file():
    content = json.loads(measure_theory(5, draws=1).to_json())
    assert content["seed"] == 5
    assert {"denoising", "attention", "signal_to_noise", "diffusion", "ista"} <= set(content)
    assert {"torch", "scikit-learn", "crate-mae"} <= set(content["versions"])
    assert "paths" not in content["diffusion"]["runs"][0]
