r"""The objective: coding rates of tokens, diffusion along their gradients, and the rate reduction to be maximised.

A coding rate counts the nats needed to code the tokens up to a Gaussian distortion eps: many directions in use, large
rate; few, small rate. A good representation has a large rate as a whole and a small one inside each of its subspaces.

All rates are computed in float64 and returned in the input's precision (float32 for half precisions), also under
autocast: nearly parallel tokens give a Gram matrix whose condition number is beyond what float32 resolves.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.theory.derivatives import in_float64
from crate_mae.theory.subspaces import project, unproject


def coding_rate(z: Float[Tensor, "*batch n d"], eps: float = 0.5) -> Float[Tensor, "*batch"]:
    r"""R(Z) = 1/2 logdet(I_n + d/(n eps^2) Z Z^T), in nats.

    Source: arXiv 2306.01129, section 2.1.

    Args:
        z: tokens Z.
        eps: distortion; the formula squares it.
    """
    n, d = z.shape[-2:]
    return _like(_half_logdet(in_float64(z), d / (n * eps**2)), z)


def coding_rate_gradient(z: Float[Tensor, "*batch n d"], eps: float = 0.5) -> Float[Tensor, "*batch n d"]:
    r"""The gradient of `coding_rate`: grad R(Z) = a (I_n + a Z Z^T)^-1 Z with a = d/(n eps^2)."""
    n, d = z.shape[-2:]
    a = d / (n * eps**2)
    return _like(a * _shrink(in_float64(z), a), z)


def projected_coding_rate(w: Float[Tensor, "*batch h n p"], eps: float = 0.5) -> Float[Tensor, "*batch"]:
    r"""R^c = 1/2 sum_k logdet(I_n + p/(n eps^2) W_k W_k^T), from the projections W_k = Z U_k alone."""
    n, p = w.shape[-2:]
    return _like(_half_logdet(in_float64(w), p / (n * eps**2)).sum(-1), w)


def moment_coding_rate(moment: Float[Tensor, "*batch d d"], eps: float = 0.5) -> Float[Tensor, "*batch"]:
    r"""R(Z) = 1/2 logdet(I_d + d/eps^2 M) from the second moment M = Z^T Z / n of any number n of tokens alone.

    Sylvester's identity turns `coding_rate` into this form, which pools the tokens of many images: moments add up. With
    Q_k^T M Q_k for M, p x p, it is the term of subspace Q_k in R^c.
    """
    factor = _cholesky_factor(in_float64(moment), moment.shape[-1] / eps**2)
    return _like(factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), moment)


def subspace_coding_rate(
    z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"], eps: float = 0.5
) -> Float[Tensor, "*batch"]:
    r"""R^c(Z | U) = 1/2 sum_k logdet(I_n + p/(n eps^2) (Z U_k)(Z U_k)^T): the rate of the tokens inside each subspace.

    Source: arXiv 2306.01129, section 2.1.

    Args:
        z: tokens Z.
        u: subspace bases U_k.
        eps: distortion; the formula squares it.
    """
    return _like(projected_coding_rate(project(in_float64(z), in_float64(u)), eps), z)


def subspace_coding_rate_gradient(
    z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"], eps: float = 0.5, neumann_order: int | None = None
) -> Float[Tensor, "*batch n d"]:
    r"""The gradient of `subspace_coding_rate`, exact or by the series that leads to attention.

        grad R^c(Z | U) = a sum_k (I_n + a W_k W_k^T)^-1 W_k U_k^T,   W_k = Z U_k,   a = p/(n eps^2)

    With `neumann_order` m the inverse becomes the first m + 1 terms of its Neumann series sum_i (-a W_k W_k^T)^i, which
    converges when a ||W_k||_2^2 < 1. Order 1 is attention without its softmax,

        grad R^c(Z | U) ~ a sum_k (W_k - a W_k W_k^T W_k) U_k^T = a sum_k (W_k - linear_ssa(W_k, a)) U_k^T,

    so that a descent step shrinks tokens, by -W_k, and adds attention. The published attention step keeps only the
    attention. It drops -W_k, the larger term where the series converges, and is therefore not a descent step on R^c
    (`docs/derivation.md`, section 2). Source: arXiv 2306.01129, section 2.3.

    Args:
        z: tokens Z.
        u: subspace bases U_k.
        eps: distortion; the formula squares it.
        neumann_order: m, the highest power of the series; None takes the exact inverse.

    Raises:
        UserError: if the order is negative.
    """
    if neumann_order is not None and neumann_order < 0:
        raise UserError(f"neumann_order={neumann_order}: give 0, 1, 2, ..., or None for the exact inverse.")
    u_exact = in_float64(u)
    w = project(in_float64(z), u_exact)
    n, p = w.shape[-2:]
    a = p / (n * eps**2)
    shrunk = _shrink(w, a) if neumann_order is None else _shrink_by_series(w, a, neumann_order)
    return _like(a * unproject(shrunk, u_exact), z)


def official_subspace_coding_rate(w: Float[Tensor, "*batch h n p"], e: float = 0.01) -> Float[Tensor, "*batch"]:
    r"""R^c = 1/2 sum_k logdet(I_n + p/(n e) X_k X_k^T), X_k = W_k with every row scaled to unit length.

    This is how the official code takes the layer-wise measure of the papers' figures: `e` stands where the formula has
    eps^2. The official code averages over images, this function returns each image's rate. A zero token, which is NaN
    there, stays zero here.
    """
    unit = F.normalize(in_float64(w), dim=-1)
    return _like(projected_coding_rate(unit, eps=math.sqrt(e)), w)


def rate_reduction(
    z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"], eps: float = 0.5
) -> Float[Tensor, "*batch"]:
    r"""Delta R(Z | U) = R(Z) - R^c(Z | U): the information gained by telling the subspaces apart."""
    return coding_rate(z, eps) - subspace_coding_rate(z, u, eps)


def sparse_rate_reduction(
    z: Float[Tensor, "*batch n d"],
    u: Float[Tensor, "h d p"],
    eps: float = 0.5,
    sparsity_weight: float = 0.1,
    norm: Literal["l0", "l1"] = "l0",
) -> Float[Tensor, "*batch"]:
    r"""Delta R(Z | U) - lambda ||Z||_0, the objective from which the layers of the encoder are derived.

    Source: arXiv 2306.01129, section 2.1.

    Args:
        z: tokens Z.
        u: subspace bases U_k.
        eps: distortion; the formula squares it.
        sparsity_weight: lambda.
        norm: "l0" counts the non-zero entries; "l1" sums their magnitudes, its convex relaxation.

    Raises:
        UserError: if the norm is neither.
    """
    if norm not in ("l0", "l1"):
        raise UserError(f'norm="{norm}": choose "l0" or "l1".')
    sparsity = z.count_nonzero(dim=(-2, -1)) if norm == "l0" else z.abs().sum(dim=(-2, -1))
    return rate_reduction(z, u, eps) - sparsity_weight * sparsity


def structured_diffusion(
    z: Float[Tensor, "n d"],
    u: Float[Tensor, "h d p"],
    *,
    step_size: float,
    steps: int,
    eps: float = 0.5,
    together: bool = True,
) -> Float[Tensor, "t n d"]:
    r"""The path Z_0, ..., Z_steps down the subspace rate, where tokens take on structure, or up, where they lose it.

        forward, an encoder's step:   Z_{l+1} = Z_l - kappa grad R^c(Z_l | U)
        reverse, a decoder's step:    Z_{l+1} = Z_l + kappa grad R^c(Z_l | U)

    The gradient of R^c over many tokens at once multiplies them all by one matrix, so it cannot tell which token is of
    which subspace. Over each token alone, `together=False`, it is 1/2 sum_k log(1 + p/eps^2 ||U_k^T z||^2) that
    descends, whose gradient is weak along the subspace where the token has most of its energy, and strong along the
    others. Source: arXiv 2404.02446, section 2.

    Args:
        z: tokens Z_0.
        u: subspace bases U_k.
        step_size: kappa; above 0 structures the tokens, below 0 undoes it.
        steps: how many steps.
        eps: distortion; the formula squares it.
        together: the rate of all tokens at once, or the sum of the rates of each token alone.

    Raises:
        UserError: if there is no step to take.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: give at least 1.")
    path = [z]
    for _ in range(steps):
        if together:
            gradient = subspace_coding_rate_gradient(path[-1], u, eps)
        else:
            gradient = subspace_coding_rate_gradient(path[-1].unsqueeze(-2), u, eps).squeeze(-2)
        path.append(path[-1] - step_size * gradient)
    return torch.stack(path)


def _half_logdet(z: Float[Tensor, "*batch n d"], a: float) -> Float[Tensor, "*batch"]:
    """1/2 logdet(I_n + a Z Z^T) = 1/2 logdet(I_d + a Z^T Z) (Sylvester) = sum_i log L_ii of the Cholesky factor."""
    return _smaller_factor(z, a).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _shrink(z: Float[Tensor, "*batch n d"], a: float) -> Float[Tensor, "*batch n d"]:
    """(I_n + a Z Z^T)^-1 Z = Z (I_d + a Z^T Z)^-1, solved on the smaller side."""
    n, d = z.shape[-2:]
    factor = _smaller_factor(z, a)
    return torch.cholesky_solve(z, factor) if n <= d else torch.cholesky_solve(z.mT, factor).mT


def _shrink_by_series(w: Float[Tensor, "*batch n p"], a: float, order: int) -> Float[Tensor, "*batch n p"]:
    """sum_{i=0}^{order} (-a W W^T)^i W, by Horner's rule: T <- W - a W W^T T."""
    total = w
    for _ in range(order):
        total = w - a * (w @ (w.mT @ total))
    return total


def _smaller_factor(z: Float[Tensor, "*batch n d"], a: float) -> Float[Tensor, "*batch m m"]:
    """The Cholesky factor of I_n + a Z Z^T or of I_d + a Z^T Z, whichever is smaller."""
    n, d = z.shape[-2:]
    return _cholesky_factor(z @ z.mT if n <= d else z.mT @ z, a)


def _cholesky_factor(gram: Float[Tensor, "*batch m m"], a: float) -> Float[Tensor, "*batch m m"]:
    """The Cholesky factor of I + a G."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The unchecked form: non-finite tokens give a rate of NaN, not an exception in the middle of a training run.
    return torch.linalg.cholesky_ex(identity + a * gram).L


def _like(result: Float[Tensor, "*shape"], x: Tensor) -> Float[Tensor, "*shape"]:
    """Back to the device and precision of x, at least float32."""
    return result.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
