"""Measures of a representation that need neither labels nor subspaces."""

import torch
from jaxtyping import Float
from torch import Tensor


def zero_fraction(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The fraction of exact zeros: the sparsity of a code, 0 when dense and 1 when nothing is active."""
    return (x == 0).mean(dtype=torch.float32)


def effective_rank(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    r"""erank(Z) = exp(-sum_i q_i log q_i) with q_i = sigma_i / sum_j sigma_j over the singular values of Z.

    Between 1 (one direction) and min(n, d) (all directions equally used); 1 for all-zero tokens, where the formula says
    nothing. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. The tokens are taken as given: centre them
    first to disregard their mean.
    """
    sigma = torch.linalg.svdvals(z.to(torch.promote_types(z.dtype, torch.float32)))
    q = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(q).sum().exp()


def token_diversity(z: Float[Tensor, "*batch n d"]) -> Float[Tensor, ""]:
    r"""The share of the tokens' energy in which the tokens of one image differ: sum_i ||z_i - m||^2 / sum_i ||z_i||^2.

    m is the mean token of each image; energies are summed over images before the ratio is taken. 0 when all tokens of
    an image are equal (rank collapse: the place of a patch and what it shows are lost), 1 when their mean is zero, and
    0 for all-zero tokens. It is the square of the relative residual of Dong, Cordonnier and Loukas, "Attention is not
    all you need", ICML 2021, in the Frobenius norm.
    """
    energy = z.float().square().sum()
    return (z.float() - z.float().mean(dim=-2, keepdim=True)).square().sum() / energy.clamp_min(1e-30)
