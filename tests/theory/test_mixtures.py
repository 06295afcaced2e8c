"""Sampled mixtures have the covariance, the labels and the noise that they are asked for."""

import pytest
import torch

from crate_mae.theory import orthonormal_bases, sample_mixture, signal_to_noise


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_shapes_and_reproducibility(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    samples = [sample_mixture(11, u, 0.1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert samples[0].tokens.shape == samples[0].clean.shape == (11, 17)
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)
    assert not torch.equal(samples[0].tokens, samples[2].tokens)


def test_clean_tokens_lie_on_the_subspace_of_their_label(generator):
    u = orthonormal_bases(3, 17, 5, generator)
    sample = sample_mixture(101, u, 0.3, generator)
    basis = u[sample.labels]
    inside = torch.einsum("ndp,nep,ne->nd", basis, basis, sample.clean)
    torch.testing.assert_close(inside, sample.clean)
    assert (sample.tokens - sample.clean).abs().min() > 0
    noiseless = sample_mixture(101, u, 0.0, generator)
    torch.testing.assert_close(noiseless.tokens, noiseless.clean, rtol=0, atol=0)


def test_tokens_have_the_stated_covariance_and_subspaces_are_equally_likely(generator):
    u, noise_std, n = orthonormal_bases(2, 7, 3, generator), 0.5, 40_000
    sample = sample_mixture(n, u, noise_std, generator)
    for k in range(2):
        tokens = sample.tokens[sample.labels == k]
        assert abs(len(tokens) / n - 1 / 2) < 0.02
        covariance = tokens.mT @ tokens / len(tokens)
        expected = u[k] @ u[k].mT + noise_std**2 * torch.eye(7, dtype=torch.float64)
        # Entries of a sample covariance scatter by at most sqrt(2 / m) of the variance 1.25: five times that.
        assert (covariance - expected).abs().max() < 5 * 1.25 * (2 / len(tokens)) ** 0.5


def test_signal_to_noise_is_the_models(generator):
    # E||Z U||^2 = n p (1 + sigma^2) inside and n (d - p) sigma^2 outside.
    d, p, noise_std = 17, 5, 0.2
    u = orthonormal_bases(3, d, p, generator)
    sample = sample_mixture(20_000, u, noise_std, generator)
    expected = (p * (1 + noise_std**2) / ((d - p) * noise_std**2)) ** 0.5
    for k in range(3):
        ratio = signal_to_noise(sample.tokens[sample.labels == k], u)
        assert ratio[k].item() == pytest.approx(expected, rel=0.02)
        assert ratio.argmax() == k
