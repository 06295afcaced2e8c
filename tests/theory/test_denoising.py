"""The posterior mean of a mixture of low-rank Gaussians, in closed form, by autograd and by sampling."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from crate_mae.errors import UserError
from crate_mae.theory import (
    mixture_denoiser,
    mixture_log_density,
    mixture_membership,
    orthonormal_bases,
    sample_mixture,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(3, 17, 5), (5, 7, 3)])  # orthogonal to each other, and not
@pytest.mark.parametrize("noise_std", [0.1, 0.7, 2.0])
def test_the_density_is_the_mean_of_the_components(shape, noise_std, generator):
    u = orthonormal_bases(*shape, generator)
    z = sample_mixture(11, u, noise_std, generator).tokens
    eye = torch.eye(shape[1], dtype=torch.float64)
    components = [MultivariateNormal(torch.zeros(shape[1]).double(), b @ b.mT + noise_std**2 * eye) for b in u]
    each = torch.stack([component.log_prob(z) for component in components])
    torch.testing.assert_close(mixture_log_density(z, u, noise_std), each.exp().mean(0).log())
    torch.testing.assert_close(mixture_membership(z, u, noise_std), torch.softmax(each.mT, dim=-1))


@pytest.mark.parametrize("shape", [(3, 17, 5), (5, 7, 3)])
@pytest.mark.parametrize("noise_std", [0.1, 0.7, 2.0])
def test_the_denoiser_is_tweedies_formula(shape, noise_std, generator):
    u = orthonormal_bases(*shape, generator)
    z = sample_mixture(11, u, noise_std, generator).tokens.requires_grad_()
    (score,) = torch.autograd.grad(mixture_log_density(z, u, noise_std).sum(), z)
    torch.testing.assert_close(mixture_denoiser(z, u, noise_std), z + noise_std**2 * score)


def test_the_denoiser_is_the_mean_of_what_may_have_been(generator):
    # E[x | z] by importance sampling: clean tokens of the prior, weighed by how likely each makes z.
    u, noise_std = orthonormal_bases(2, 3, 1, generator), 0.5
    z = sample_mixture(5, u, noise_std, generator).tokens
    clean = sample_mixture(200_000, u, 0.0, generator).clean
    weights = torch.softmax(-torch.cdist(z, clean).square() / (2 * noise_std**2), dim=-1)
    torch.testing.assert_close(mixture_denoiser(z, u, noise_std), weights @ clean, rtol=0, atol=0.01)


def test_no_rescaling_or_projection_has_a_smaller_error(generator):
    u, noise_std = orthonormal_bases(3, 17, 5, generator), 0.4
    sample = sample_mixture(5000, u, noise_std, generator)
    denoised = mixture_denoiser(sample.tokens, u, noise_std)
    basis = u[mixture_membership(sample.tokens, u, noise_std).argmax(-1)]
    nearest = torch.einsum("ndp,nep,ne->nd", basis, basis, sample.tokens)

    def error(z):
        return (z - sample.clean).square().mean()

    others = [sample.tokens, nearest, nearest / (1 + noise_std**2), 0.97 * denoised, 1.03 * denoised]
    assert all(error(denoised) < error(other) for other in others)


@pytest.mark.parametrize("function", [mixture_log_density, mixture_membership, mixture_denoiser])
@pytest.mark.parametrize("noise_std", [0.0, -1.0, float("nan")])
def test_no_noise_is_refused(function, noise_std, generator):
    u = orthonormal_bases(3, 17, 5, generator)
    with pytest.raises(UserError, match="give a number above 0"):
        function(torch.ones(2, 17, dtype=torch.float64), u, noise_std)
