"""Structured diffusion descends the subspace rate, of all tokens or of each, and its reverse undoes it."""

import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.theory import (
    orthonormal_bases,
    sample_mixture,
    structured_diffusion,
    subspace_coding_rate,
)


@pytest.fixture
def tokens_and_bases():
    generator = torch.Generator().manual_seed(0)
    u = orthonormal_bases(3, 17, 5, generator)
    return sample_mixture(11, u, 0.3, generator).tokens, u


@pytest.mark.parametrize("together", [True, False])
def test_a_step_is_one_of_gradient_descent(tokens_and_bases, together):
    z, u = tokens_and_bases
    z = z.requires_grad_()
    rate = subspace_coding_rate(z if together else z.unsqueeze(-2), u, 0.7).sum()
    (gradient,) = torch.autograd.grad(rate, z)
    path = structured_diffusion(z.detach(), u, step_size=0.3, steps=1, eps=0.7, together=together)
    assert path.shape == (2, 11, 17)
    torch.testing.assert_close(path[1], (z - 0.3 * gradient).detach())


def test_every_step_lowers_the_rate_and_every_step_back_raises_it(tokens_and_bases):
    z, u = tokens_and_bases
    there = structured_diffusion(z, u, step_size=0.3, steps=7)
    back = structured_diffusion(there[-1], u, step_size=-0.3, steps=7)
    assert (subspace_coding_rate(there, u).diff() < 0).all()
    assert (subspace_coding_rate(back, u).diff() > 0).all()


def test_the_reverse_returns_the_better_the_smaller_the_steps(tokens_and_bases):
    z, u = tokens_and_bases
    missed = []
    for steps in (10, 40):
        there = structured_diffusion(z, u, step_size=0.4 / steps, steps=steps, together=False)
        back = structured_diffusion(there[-1], u, step_size=-0.4 / steps, steps=steps, together=False)
        missed.append((back[-1] - z).norm().item())
    assert missed[1] < 0.3 * missed[0] < 0.3 * (there[-1] - z).norm().item()


def test_no_steps_are_refused(tokens_and_bases):
    with pytest.raises(UserError, match="steps=0"):
        structured_diffusion(*tokens_and_bases, step_size=0.1, steps=0)
