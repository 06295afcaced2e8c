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
