"""First claim: a gradient step on the subspace rate does what the best denoiser does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.interpret.theory.spread import Spread, cosine, generator, spreads
from crate_mae.theory import (
    MixtureSample,
    mixture_denoiser,
    orthonormal_bases,
    project,
    sample_mixture,
    ssa,
    subspace_coding_rate_gradient,
    unproject,
)

NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
DIMENSIONS = (32, 48, 64, 96, 128)
SUBSPACES = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class DenoisingPoint:
    """One setting, measured over draws.

    Attributes:
        noise_std: sigma.
        d: width of the tokens.
        h: number of subspaces.
        p: dimension of each subspace.
        tokens: number of tokens.
        cosine: between the denoiser's move and that of each step.
        error: share of the tokens' norm outside their own subspace, before ("noisy"), after the denoiser, after a step.
    """

    noise_std: float
    d: int
    h: int
    p: int
    tokens: int
    cosine: dict[str, Spread]
    error: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """The denoiser beside the steps, one thing varied at a time."""

    draws: int
    by_noise: tuple[DenoisingPoint, ...]
    by_dimension: tuple[DenoisingPoint, ...]
    by_subspaces: tuple[DenoisingPoint, ...]


def measure_denoising(
    seed: int = 0,
    draws: int = 5,
    *,
    noise: Sequence[float] = NOISE,
    dimensions: Sequence[int] = DIMENSIONS,
    subspaces: Sequence[int] = SUBSPACES,
) -> Denoising:
    """Vary the noise (subspaces fill the space), the dimension (they do not), and the number of subspaces (they do)."""

    def point(noise_std: float, d: int, h: int) -> DenoisingPoint:
        return _point(seed, draws, noise_std=noise_std, d=d, h=h)

    return Denoising(
        draws=draws,
        by_noise=tuple(point(sigma, 32, 4) for sigma in noise),
        by_dimension=tuple(point(0.2, d, 4) for d in dimensions),
        by_subspaces=tuple(point(0.2, 8 * h, h) for h in subspaces),
    )


def _point(seed: int, draws: int, *, noise_std: float, d: int, h: int, p: int = 8, tokens: int = 256) -> DenoisingPoint:
    cosines, errors = [], []
    for draw in range(draws):
        source = generator(seed, draw)
        u = orthonormal_bases(h, d, p, source)
        sample = sample_mixture(tokens, u, noise_std, source)
        denoised = mixture_denoiser(sample.tokens, u, noise_std)
        after = _steps(sample, u, noise_std)
        move = denoised - sample.tokens
        cosines.append({name: cosine(z - sample.tokens, move) for name, z in after.items()})
        states = {"noisy": sample.tokens, "denoiser": denoised, **after}
        errors.append({name: _error(z, u, sample.labels) for name, z in states.items()})
    return DenoisingPoint(
        noise_std=noise_std, d=d, h=h, p=p, tokens=tokens, cosine=spreads(cosines), error=spreads(errors)
    )


def _steps(sample: MixtureSample, u: Float[Tensor, "h d p"], noise_std: float) -> dict[str, Tensor]:
    r"""Tokens after one step of each kind, all with kappa = 1/a.

    At that size the step with softmax, Z - kappa a sum_k (W_k - P_k W_k) U_k^T, is MSSA(Z) where orthogonal subspaces
    fill the space; elsewhere MSSA(Z) also drops what lies outside of them. The network adds MSSA(Z) to Z instead: see
    `attention`.

    The distortion is chosen in favour of the claim: 1/a lies between the noise's energy and the signal's (their
    geometric mean), so that the gradient is strong where there is noise and weak where there is signal.
    """
    z, p = sample.tokens, u.shape[-1]
    energy = noise_std * (1 + noise_std**2) ** 0.5
    by_cluster = z.clone()
    for k in sample.labels.unique():
        of_k = sample.labels == k
        by_cluster[of_k] = _descend(z[of_k], u, (p * energy) ** 0.5)
    return {
        "token": _descend(z.unsqueeze(-2), u, p * energy**0.5).squeeze(-2),
        "cluster": by_cluster,
        "all": _descend(z, u, (p * energy) ** 0.5),
        "attention": unproject(ssa(project(z, u), 1.0), u),
    }


def _descend(z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"], eps: float) -> Float[Tensor, "*batch n d"]:
    return z - z.shape[-2] * eps**2 / u.shape[-1] * subspace_coding_rate_gradient(z, u, eps)


def _error(z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], labels: Tensor) -> float:
    basis = u[labels]
    outside = z - torch.einsum("ndp,nep,ne->nd", basis, basis, z)
    return (torch.linalg.vector_norm(outside) / torch.linalg.vector_norm(z)).item()
