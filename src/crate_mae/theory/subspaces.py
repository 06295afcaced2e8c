"""Families of low-dimensional subspaces: project onto them, draw them, and measure how far apart they are."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.theory.derivatives import in_float64
from crate_mae.theory.sparse_coding import top_singular_pair


def project(z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch h n p"]:
    """W_k = Z U_k: the coordinates of every token in every subspace."""
    # One product with all bases side by side: on a CPU many times as fast as a batch of h broadcast ones.
    return (z @ u.transpose(0, 1).flatten(1)).unflatten(-1, (u.shape[0], u.shape[2])).transpose(-3, -2)


def unproject(w: Float[Tensor, "*batch h n p"], u: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch n d"]:
    """sum_k W_k U_k^T: back from coordinates in the subspaces to token space; the adjoint of `project`."""
    return torch.einsum("...hnp,hdp->...nd", w, u)


def orthonormal_bases(
    num_subspaces: int, d: int, p: int, generator: torch.Generator | None = None
) -> Float[Tensor, "h d p"]:
    """Draw bases U_k with U_k^T U_k = I, uniformly distributed, in float64.

    When they fit (num_subspaces * p <= d) the subspaces are also orthogonal to each other, U_k^T U_l = 0, which is
    what the papers' token model asks for; otherwise each is drawn on its own.

    Args:
        num_subspaces: how many bases, h.
        d: dimension of the space they live in.
        p: dimension of each subspace, at most d.
        generator: source of randomness; the global one if None.

    Raises:
        UserError: if p is larger than d.
    """
    if not 1 <= p <= d:
        raise UserError(f"A subspace of dimension p={p} does not fit in d={d} dimensions: choose 1 <= p <= {d}.")
    if num_subspaces * p <= d:
        frame = orthonormal_columns(torch.randn(d, num_subspaces * p, generator=generator, dtype=torch.float64))
        return frame.unflatten(1, (num_subspaces, p)).transpose(0, 1).contiguous()
    return orthonormal_columns(torch.randn(num_subspaces, d, p, generator=generator, dtype=torch.float64))


def orthonormal_columns(matrix: Float[Tensor, "*batch d m"]) -> Float[Tensor, "*batch d m"]:
    """Columns that span the same spaces, by QR; those of a Gaussian matrix are uniformly distributed."""
    q, r = torch.linalg.qr(matrix)
    # QR leaves the signs to the implementation; a positive diagonal of R makes it unique and Q uniform (Haar).
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def newton_schulz(u: Float[Tensor, "d d"], steps: int = 1) -> Float[Tensor, "d d"]:
    # type: (Tensor, int) -> Tensor
    r"""`steps` times U <- 3/2 U - 1/2 U U^T U, which moves a square matrix towards the nearest orthogonal one.

    A singular value sigma becomes sigma (3 - sigma^2)/2: for 0 < sigma < sqrt(3) the iteration converges to 1, in the
    end quadratically, and is at most 1 from the first step on. If ||U^T U - I||_2 = delta < 1, after a step it is at
    most 3/4 delta^2 + 1/4 delta^3. A step costs two products of d x d matrices.
    """
    for _ in range(steps):
        u = torch.addmm(u, u, u.t() @ u, beta=1.5, alpha=-0.5)
    return u


def retraction(u: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    r"""Back towards the orthogonal matrices after a change of an orthogonal U, such as an optimizer's step.

    Steps of `newton_schulz` until ||U^T U - I||_2 is about 1/4 or less; one suffices if it was below 1/2. If it was
    above 1, beyond which Newton-Schulz steps may not converge, the `polar_factor`. The norm is an estimate from below,
    by two iterations of the power method: for signs and outer products of signs added to U it is up to a sixth too low,
    in general it has no bound. It is compared with four fifths of these limits. For numbers that are not finite, the
    result is not finite either.
    """
    error = u.t() @ u
    error.diagonal().sub_(1)
    top = top_singular_pair(error, iterations=2)
    distance = float(top.u @ (error @ top.v))
    if _BEYOND_NEWTON_SCHULZ < distance < math.inf:
        return polar_factor(u)
    stepped = torch.addmm(u, u, error, alpha=-0.5)  # as `newton_schulz`, of the matrix that is known already
    return retraction(stepped) if _NEAR_ORTHOGONAL < distance < math.inf else stepped


def distance_from_orthogonal(u: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    r"""||U^T U - I||_F / sqrt(d), the root mean square over singular values of sigma^2 - 1; 0 if U is orthogonal."""
    gram = u.mT @ u
    gram.diagonal().sub_(1)
    return torch.linalg.matrix_norm(gram) / len(u) ** 0.5


def polar_factor(u: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    r"""U (U^T U)^-1/2, the orthogonal matrix nearest to U; any of the nearest if U is singular.

    Computed in float64 and returned in the precision of U: by `newton_schulz` where ||U^T U - I||_F < 1, which puts all
    singular values between 0 and sqrt(2), and by a singular value decomposition elsewhere.
    """
    exact = in_float64(u)
    return _polar_factor(exact, float(distance_from_orthogonal(exact))).to(u)


def _polar_factor(u: Float[Tensor, "d d"], distance: float) -> Float[Tensor, "d d"]:
    """The polar factor in the precision of U, whose `distance_from_orthogonal` is known."""
    if distance * len(u) ** 0.5 >= 1:
        left, _, right = torch.linalg.svd(u)
        return left @ right
    while distance > _CONVERGED:
        u = newton_schulz(u)
        distance = float(distance_from_orthogonal(u))
    return u


def nearest_orthogonal(u: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    r"""The `polar_factor` of a matrix of which it is meaningful: the orthogonal matrix that U was meant to be.

    Raises:
        UserError: if `distance_from_orthogonal` is more than `FAR_FROM_ORTHOGONAL`, or a singular value is below
            `_LEAST_SINGULAR_VALUE`.
    """
    exact = in_float64(u)
    distance = float(distance_from_orthogonal(exact))
    is_near = distance * len(u) ** 0.5 < 1
    if is_near or (distance <= FAR_FROM_ORTHOGONAL and torch.linalg.svdvals(exact)[-1] >= _LEAST_SINGULAR_VALUE):
        return _polar_factor(exact, distance).to(u)
    raise UserError(
        f"A matrix of subspaces of size {len(u)} x {len(u)} is far from orthogonal: the root mean square of "
        f"sigma^2 - 1 over its singular values is {distance:.3g} and may be at most {FAR_FROM_ORTHOGONAL}, and no "
        f"singular value may be below {_LEAST_SINGULAR_VALUE}.\n"
        "Either these are not the weights of monotone layers, or their training has diverged."
    )


FAR_FROM_ORTHOGONAL = 0.5  # Gaussian matrices with columns of unit length have 1
_NEAR_ORTHOGONAL = 0.4
_BEYOND_NEWTON_SCHULZ = 0.8
_LEAST_SINGULAR_VALUE = 1e-3
_CONVERGED = 1e-10


def coherence(u: Float[Tensor, "h d p"]) -> Float[Tensor, ""]:
    """max_{k != l} ||U_k^T U_l||_2: the cosine of the smallest angle between two different subspaces.

    0 when they are mutually orthogonal (or there is only one), 1 when two share a direction; it means this for bases
    with orthonormal columns only, see `orthonormality_error`.
    """
    h = u.shape[0]
    overlap = torch.einsum("kdp,ldq->klpq", u, u)
    norms = torch.linalg.matrix_norm(overlap, ord=2)
    return norms.masked_fill(torch.eye(h, dtype=torch.bool, device=u.device), 0).amax()


def orthonormality_error(u: Float[Tensor, "h d p"]) -> Float[Tensor, ""]:
    """max_k ||U_k^T U_k - I||_2: 0 exactly when every basis has orthonormal columns."""
    gram = u.mT @ u
    identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return torch.linalg.matrix_norm(gram - identity, ord=2).amax()


def signal_to_noise(z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch h"]:
    """SNR_k = ||Z U_k U_k^T||_F / ||Z (I - U_k U_k^T)||_F for each subspace; infinite when nothing lies outside.

    The theorem on attention-only transformers speaks of the tokens *of* subspace k: pass those, and read entry k.
    """
    inside = project(z, u) @ u.mT
    outside = z.unsqueeze(-3) - inside
    return torch.linalg.matrix_norm(inside) / torch.linalg.matrix_norm(outside)


def principal_cosines(u: Float[Tensor, "*batch d p"], v: Float[Tensor, "*batch d q"]) -> Float[Tensor, "*batch r"]:
    r"""Cosines of the principal angles between the column spaces of u and v, largest first; r = min(p, q).

    The singular values of Q_u^T Q_v with orthonormal bases Q from a QR decomposition, so the columns need not be
    orthonormal; linearly dependent ones are completed to a space of full dimension in no particular way.
    """
    return torch.linalg.svdvals(orthonormalised(u).mT @ orthonormalised(v)).clamp_max(1)


def affinity(u: Float[Tensor, "*batch d p"], v: Float[Tensor, "*batch d q"]) -> Float[Tensor, "*batch"]:
    r"""Mean squared cosine of the principal angles, ||Q_u^T Q_v||_F^2 / min(p, q): 0 orthogonal, 1 contained.

    Two random subspaces have max(p, q)/d on average.
    """
    return principal_cosines(u, v).square().mean(-1)


def best_subspace_energy(z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch"]:
    r"""sum_i max_k ||z_i Q_k||^2 / sum_i ||z_i||^2: the share of energy in each token's best-fitting subspace.

    Q_k is an orthonormal basis of the columns of U_k, so that the share is at most 1. 0 for all-zero tokens. Tokens
    without any structure have more than p/d, because the best of h subspaces is taken.
    """
    inside = project(z, orthonormalised(u)).square().sum(-1).amax(-2)
    energy = z.square().sum((-2, -1))
    return inside.sum(-1) / torch.where(energy > 0, energy, 1)


def orthonormalised(u: Float[Tensor, "*batch d p"]) -> Float[Tensor, "*batch d p"]:
    """Orthonormal bases of the column spaces, by QR."""
    return torch.linalg.qr(u).Q


class Match(NamedTuple):
    """How well s b fits a with the best number s.

    Attributes:
        cosine: <a, b> / (||a|| ||b||), 0 if either is zero.
        scale: s.
        error: ||a - s b|| / ||a||.
    """

    cosine: Float[Tensor, "*batch"]
    scale: Float[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]


def match_up_to_scale(a: Float[Tensor, "*batch n d"], b: Float[Tensor, "*batch n d"]) -> Match:
    r"""Fit a by s b with s = <a, b> / ||b||^2, matrix by matrix; the error is then sqrt(1 - cosine^2)."""
    inner = (a * b).sum((-2, -1))
    norm_a, norm_b = torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(b)
    product = norm_a * norm_b
    cosine = (inner / torch.where(product > 0, product, 1)).clamp(-1, 1)
    scale = inner / torch.where(norm_b > 0, norm_b, 1).square()
    return Match(cosine, scale, (1 - cosine.square()).sqrt())
