"""Projections, random bases, and the two numbers that say how well subspaces are kept apart."""

import math

import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.theory import (
    coherence,
    distance_from_orthogonal,
    nearest_orthogonal,
    newton_schulz,
    orthonormal_bases,
    orthonormality_error,
    polar_factor,
    project,
    retraction,
    signal_to_noise,
    unproject,
)
from crate_mae.theory.subspaces import affinity, best_subspace_energy, match_up_to_scale, principal_cosines


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def gaussian(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_project_takes_coordinates_in_every_subspace(batch, generator):
    z, u = gaussian(*batch, 11, 7, generator=generator), gaussian(5, 7, 3, generator=generator)
    expected = torch.stack([z @ u_k for u_k in u], dim=-3)
    torch.testing.assert_close(project(z, u), expected)


def test_unproject_is_the_adjoint_of_project(generator):
    z, u = gaussian(2, 11, 7, generator=generator), gaussian(5, 7, 3, generator=generator)
    w = gaussian(2, 5, 11, 3, generator=generator)
    torch.testing.assert_close((project(z, u) * w).sum(), (z * unproject(w, u)).sum())


def test_projecting_onto_orthonormal_bases_twice_is_projecting_once(generator):
    z, u = gaussian(11, 17, generator=generator), orthonormal_bases(3, 17, 5, generator)
    inside = unproject(project(z, u), u)
    torch.testing.assert_close(unproject(project(inside, u), u), inside)


@pytest.mark.parametrize(("h", "d", "p"), [(3, 17, 5), (1, 7, 7), (5, 7, 3)])
def test_bases_are_orthonormal(h, d, p, generator):
    u = orthonormal_bases(h, d, p, generator)
    assert u.shape == (h, d, p)
    assert orthonormality_error(u) < 1e-14


def test_bases_that_fit_are_orthogonal_to_each_other(generator):
    assert coherence(orthonormal_bases(3, 17, 5, generator)) < 1e-14
    assert coherence(orthonormal_bases(5, 7, 3, generator)) > 0.1


def test_bases_depend_on_the_generator_alone():
    draws = [orthonormal_bases(3, 17, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.allclose(draws[0], draws[2])


@pytest.mark.parametrize("p", [0, 8])
def test_a_subspace_that_does_not_fit_is_refused(p):
    with pytest.raises(UserError, match=f"p={p} does not fit in d=7"):
        orthonormal_bases(2, 7, p)


def test_coherence_is_the_cosine_of_the_smallest_angle():
    # Lines in the plane at 0, 90 and 30 degrees: the closest pair is 30 degrees apart.
    angles = torch.tensor([0, math.pi / 2, math.pi / 6], dtype=torch.float64)
    lines = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(-1)
    assert coherence(lines).item() == pytest.approx(math.cos(math.pi / 6), rel=1e-14)
    assert coherence(lines[:1]) == 0


def test_orthonormality_error_by_hand():
    u = torch.eye(5, 3, dtype=torch.float64).repeat(2, 1, 1)
    u[1, 0, 0] = 1.5
    assert orthonormality_error(u).item() == pytest.approx(1.25, rel=1e-14)


def test_signal_to_noise_by_hand():
    # In R^5 with the planes (e_1, e_2) and (e_3, e_4): tokens (3, 0, 0, 0, 0) and (0, 4, 2, 0, 1).
    u = torch.eye(5, dtype=torch.float64)[:, :4].reshape(5, 2, 2).transpose(0, 1)
    z = torch.tensor([[3.0, 0, 0, 0, 0], [0, 4.0, 2.0, 0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([5 / math.sqrt(5), 2 / math.sqrt(26)], dtype=torch.float64)
    torch.testing.assert_close(signal_to_noise(z, u), expected)
    assert signal_to_noise(z[:1], u)[0] == math.inf


def test_principal_cosines_and_affinity_by_hand():
    # In R^5 the plane (e_1, e_2), and one of e_1 and e_2 turned by 60 degrees towards e_3; both in skewed bases.
    first = torch.eye(5, dtype=torch.float64)[:, :2] @ torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    second = torch.zeros(5, 2, dtype=torch.float64)
    second[0, 0], second[1, 1], second[2, 1] = 7, 0.5, math.sqrt(0.75)
    second[:, 0] += second[:, 1]
    assert principal_cosines(first, second).tolist() == pytest.approx([1, 0.5])
    assert affinity(first, second).item() == pytest.approx((1 + 0.25) / 2)
    assert affinity(first, torch.eye(5, dtype=torch.float64)[:, 3:4]).item() == pytest.approx(0, abs=1e-15)


def test_affinity_of_random_subspaces_is_their_share_of_the_space(generator):
    u, v = gaussian(500, 17, 5, generator=generator), gaussian(500, 17, 3, generator=generator)
    assert affinity(u, v).mean().item() == pytest.approx(5 / 17, abs=0.02)


def test_best_subspace_energy_by_hand():
    # The tokens of `test_signal_to_noise_by_hand`: of 9 + 21, the best planes hold 9 and 16. Bases of any length.
    u = 7 * torch.eye(5, dtype=torch.float64)[:, :4].reshape(5, 2, 2).transpose(0, 1)
    z = torch.tensor([[3.0, 0, 0, 0, 0], [0, 4.0, 2.0, 0, 1.0]], dtype=torch.float64)
    shares = best_subspace_energy(torch.stack([z, 0 * z]), u)
    assert shares.tolist() == pytest.approx([25 / 30, 0])


def test_matches_are_up_to_scale(generator):
    a = gaussian(7, 5, generator=generator)
    assert match_up_to_scale(a, -4 * a) == pytest.approx((-1, -0.25, 0), abs=1e-7)
    b = gaussian(7, 5, generator=generator)
    found = match_up_to_scale(a, b)
    assert found.error.item() == pytest.approx(((a - found.scale * b).norm() / a.norm()).item())
    assert ((a - (found.scale + 0.01) * b).norm() / a.norm()) > found.error
    assert match_up_to_scale(a, 0 * a) == (0, 0, 1)


def rotation_of(*singular_values):
    """A matrix with these singular values, and its polar factor; a reflection, to be sure."""
    generator = torch.Generator().manual_seed(5)
    d = len(singular_values)
    left, right = (orthonormal_bases(1, d, d, generator)[0] for _ in range(2))
    left[:, 0] *= -torch.linalg.det(left @ right).sign()
    return left @ torch.tensor(singular_values, dtype=torch.float64).diag() @ right, left @ right


def test_newton_schulz_turns_singular_values_as_its_formula_says():
    u, _ = rotation_of(0.5, 1.0, 1.2, 1.6)
    found = torch.linalg.svdvals(newton_schulz(u)).sort().values
    expected = torch.tensor([s * (3 - s * s) / 2 for s in (0.5, 1.0, 1.2, 1.6)], dtype=torch.float64).sort().values
    torch.testing.assert_close(found, expected)
    assert (found <= 1 + 1e-12).all()


def test_newton_schulz_converges_quadratically():
    u, _ = rotation_of(0.9, 1.0, 1.05, 1.1)
    for _ in range(3):
        identity = torch.eye(4, dtype=torch.float64)
        before = torch.linalg.matrix_norm(u.mT @ u - identity, ord=2)
        u = newton_schulz(u)
        after = torch.linalg.matrix_norm(u.mT @ u - identity, ord=2)
        assert after <= 3 / 4 * before**2 + 1 / 4 * before**3 + 1e-14
    assert torch.equal(newton_schulz(u, steps=2), newton_schulz(newton_schulz(u)))


@pytest.mark.parametrize(("values", "steps"), [((1.1, 0.9, 1.0), 1), ((1.0, 1.0, 0.7), 2), ((1.0, 0.5, 1.0), 3)])
def test_a_retraction_takes_as_many_newton_schulz_steps_as_it_needs(values, steps):
    u, _ = rotation_of(*values)
    found = retraction(u)
    torch.testing.assert_close(found, newton_schulz(u, steps))
    assert torch.linalg.matrix_norm(found.mT @ found - torch.eye(3), ord=2) < 0.25


@pytest.mark.parametrize("values", [(4.0, 1.0, 0.1), (1.0, 0.3, 1.0), (1.0, 0.0, 0.0)])
def test_the_retraction_after_a_large_change_is_the_polar_factor(values):
    u, polar = rotation_of(*values)
    assert torch.equal(retraction(u), polar_factor(u))
    torch.testing.assert_close(retraction(u).mT @ retraction(u), torch.eye(3, dtype=torch.float64))
    if min(values) > 0:
        torch.testing.assert_close(retraction(u), polar)


def test_one_step_is_enough_where_many_singular_values_change_a_little(generator):
    u = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    u += 2e-3 * torch.randn(256, 256, generator=generator).sign()
    assert torch.linalg.matrix_norm(u.mT @ u - torch.eye(256)) > 0.5
    torch.testing.assert_close(retraction(u), newton_schulz(u))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [(0, 0), (0,), (0, 2)])
def test_a_retraction_does_not_hide_numbers_that_are_not_finite(value, where):
    u = torch.eye(5)
    u[where] = value
    assert not retraction(u).isfinite().all()


def test_the_nearest_orthogonal_matrix_is_the_polar_factor():
    u, polar = rotation_of(0.7, 0.9, 1.0, 1.3, 1.1)
    assert torch.linalg.det(polar) == pytest.approx(-1)
    torch.testing.assert_close(nearest_orthogonal(u), polar)
    assert nearest_orthogonal(u.float()).dtype == torch.float32


def test_distance_from_orthogonal_by_hand():
    # Singular values 1, 2: sigma^2 - 1 is 0 and 3, its root mean square 3 / sqrt(2).
    u = torch.tensor([[0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    assert distance_from_orthogonal(u) == pytest.approx(3 / 2**0.5)


@pytest.mark.parametrize("values", [(0.0, 1.0, 1.0, 1.0, 1.0, 1.0), (0.1, 2.0, 0.5, 1.0, 1.0), (0.0, 0.0)])
def test_a_matrix_far_from_orthogonal_has_no_nearest(values):
    u, _ = rotation_of(*values)
    with pytest.raises(UserError, match="far from orthogonal"):
        nearest_orthogonal(u)


def test_a_singular_value_beyond_the_basin_keeps_its_sign():
    u = torch.eye(64, dtype=torch.float64)
    u[0, 0] = 2.0  # Newton-Schulz would take it to -1
    torch.testing.assert_close(nearest_orthogonal(u), torch.eye(64, dtype=torch.float64))
