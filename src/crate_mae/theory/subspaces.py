"""Families of low-dimensional subspaces: project onto them, draw them, and tell how well they are kept apart."""

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError


def project(z: Float[Tensor, "*batch n d"], u: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch h n p"]:
    """W_k = Z U_k: the coordinates of every token in every subspace."""
    return z.unsqueeze(-3) @ u


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
        frame = _orthonormal_columns(torch.randn(d, num_subspaces * p, generator=generator, dtype=torch.float64))
        return frame.unflatten(1, (num_subspaces, p)).transpose(0, 1).contiguous()
    return _orthonormal_columns(torch.randn(num_subspaces, d, p, generator=generator, dtype=torch.float64))


def _orthonormal_columns(gaussian: Float[Tensor, "*batch d m"]) -> Float[Tensor, "*batch d m"]:
    q, r = torch.linalg.qr(gaussian)
    # QR leaves the signs to the implementation; a positive diagonal of R makes it unique and Q uniform (Haar).
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


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
