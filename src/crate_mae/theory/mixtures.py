"""Synthetic tokens that obey the papers' model, to test the theory on: noisy mixtures of low-rank Gaussians."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
