r"""The papers' model of tokens, a noisy mixture of low-rank Gaussians: drawn, and denoised by its posterior mean.

Tokens z = U_k a + sigma e with k uniform, a ~ N(0, I_p) and e ~ N(0, I_d) have covariance U_k U_k^T + sigma^2 I given
k. With orthonormal columns in every U_k its inverse and its determinant are

    (U_k U_k^T + sigma^2 I)^-1 = (I - U_k U_k^T / (1 + sigma^2)) / sigma^2,   (1 + sigma^2)^p sigma^(2 (d - p)),

and the density, the memberships and the denoiser follow in closed form. Compression against U is such denoising
according to arXiv 2404.02446, section 2.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.theory.subspaces import project


class MixtureSample(NamedTuple):
    """Tokens of a mixture, the same tokens before noise, and the subspace that each came from."""

    tokens: Float[Tensor, "n d"]
    clean: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]


def sample_mixture(
    num_tokens: int, bases: Float[Tensor, "h d p"], noise_std: float, generator: torch.Generator | None = None
) -> MixtureSample:
    r"""z_i = U_k a_i + sigma e_i with k uniform on the subspaces, a_i ~ N(0, I_p), e_i ~ N(0, I_d).

    The tokens of subspace k have covariance U_k U_k^T + sigma^2 I. Source: arXiv 2306.01129, section 2.2.

    Args:
        num_tokens: how many tokens to draw, n.
        bases: bases U_k, see `orthonormal_bases`; they choose precision and device.
        noise_std: sigma; 0 leaves the tokens on their subspaces.
        generator: source of randomness, on the device of the bases; the global one if None.
    """
    h, d, p = bases.shape
    device, dtype = bases.device, bases.dtype
    labels = torch.randint(h, (num_tokens,), generator=generator, device=device)
    coefficients = torch.randn(num_tokens, p, generator=generator, device=device, dtype=dtype)
    noise = torch.randn(num_tokens, d, generator=generator, device=device, dtype=dtype)
    clean = torch.einsum("ndp,np->nd", bases[labels], coefficients)
    return MixtureSample(clean + noise_std * noise, clean, labels)


def mixture_log_density(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], noise_std: float) -> Float[Tensor, " n"]:
    r"""The density log q_sigma(z) = logsumexp_k log N(z; 0, U_k U_k^T + sigma^2 I) - log h.

    Args:
        z: tokens Z.
        u: bases U_k with orthonormal columns.
        noise_std: sigma, above 0.

    Raises:
        UserError: if sigma is not above 0: the density is then no function.
    """
    h, d, p = u.shape
    evidence = _evidence(z, u, noise_std)
    variance = noise_std**2
    log_determinant = p * math.log1p(variance) + (d - p) * math.log(variance)
    outside = z.square().sum(-1) / variance
    constant = -0.5 * (d * math.log(2 * math.pi) + log_determinant) - math.log(h)
    return constant - 0.5 * outside + torch.logsumexp(evidence, dim=-1)


def mixture_membership(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], noise_std: float) -> Float[Tensor, "n h"]:
    r"""P(k | z) = softmax_k ||U_k^T z||^2 / (2 sigma^2 (1 + sigma^2)): which subspace a token is likely to be of.

    Args:
        z: tokens Z.
        u: bases U_k with orthonormal columns.
        noise_std: sigma, above 0.

    Raises:
        UserError: if sigma is not above 0.
    """
    return torch.softmax(_evidence(z, u, noise_std), dim=-1)


def mixture_denoiser(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], noise_std: float) -> Float[Tensor, "n d"]:
    r"""E[x | z] = z + sigma^2 grad log q_sigma(z) = sum_k P(k | z) U_k U_k^T z / (1 + sigma^2).

    The first equation is Tweedie's formula; the second, its closed form here: project the token onto each subspace,
    weigh by membership, and shrink. No other function of z has a smaller mean squared error.

    Args:
        z: tokens Z.
        u: bases U_k with orthonormal columns.
        noise_std: sigma, above 0.

    Raises:
        UserError: if sigma is not above 0.
    """
    membership = mixture_membership(z, u, noise_std)
    return torch.einsum("nk,knp,kdp->nd", membership, project(z, u), u) / (1 + noise_std**2)


def _evidence(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], noise_std: float) -> Float[Tensor, "n h"]:
    """What distinguishes the components' log densities; the rest of them is the same for all k."""
    if not noise_std > 0:
        raise UserError(f"noise_std={noise_std}: without noise there is nothing to remove; give a number above 0.")
    return project(z, u).square().sum(-1).mT / (2 * noise_std**2 * (1 + noise_std**2))
