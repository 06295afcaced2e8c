r"""An attention step that provably never raises the coding rate in any subspace.

The published step Z + MSSA(Z) is not a descent step on R^c: it drops a term of the gradient, and its output projection
is free. Even with both restored, W_k - kappa (W_k - P_k W_k) with a softmax P_k may raise R^c: it does in 502 of the
5,000 cases of `tests/theory/test_compression.py`, which also keeps one. What is missing is that P_k contracts.

**Balance.** For any matrix A of positive affinities, with D_r and D_c the diagonals of its row sums and column sums,

    B = D_r^-1/2 A D_c^-1/2   has   ||B||_2 <= 1:

u^T B v = sum_ij A_ij (u_i / sqrt r_i)(v_j / sqrt c_j) <= 1/2 sum_ij A_ij (u_i^2 / r_i + v_j^2 / c_j)
= 1/2 (||u||^2 + ||v||^2), which is 1 for unit vectors (a Schur test).

**Theorem.** Let U = [U_1 .. U_h] be orthogonal, W_k = X U_k, 0 <= kappa_k <= 1 and ||B_k||_2 <= 1. The step

    W_k' = (1 - kappa_k) W_k + kappa_k B_k W_k,   that is   X' = X + sum_k kappa_k (B_k W_k - W_k) U_k^T,

has R^c(X' | U) <= R^c(X | U) for every distortion eps, subspace by subspace. *Proof.* M = (1 - kappa) I + kappa B has
||M||_2 <= 1 by the triangle inequality, so W^T M^T M W <= W^T W in the order of positive semidefinite matrices, and
logdet(I + a .) is monotone in that order. U being orthogonal, X' U_k = W_k', so that the subspaces do not disturb each
other. No singular value of W_k rises, and so no monotone function of them.

**Reverse.** W_k' = (1 + kappa_k) W_k - kappa_k B_k W_k has ||((1 + kappa) I - kappa B) v|| >= ||v||: no rate falls.
It undoes the step to first order in kappa, since (I - kappa (I - B))^-1 = I + kappa (I - B) + O(kappa^2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_mae.private_torch import softmax_backward
from crate_mae.theory.derivatives import (
    as_batch,
    at_least_float,
    pieces,
    with_all_derivatives,
    without_autocast,
)

Scale = float | Float[Tensor, "*#batch 1 1"]


def balance(log_affinity: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    r"""B = D_r^-1/2 A D_c^-1/2 of A = exp(log_affinity), D_r and D_c its row and column sums; ||B||_2 <= 1.

    The exponents log A_ij - 1/2 log r_i - 1/2 log c_j are at most 0, so that nothing overflows.
    """
    rows = torch.logsumexp(log_affinity, dim=-1, keepdim=True)
    columns = torch.logsumexp(log_affinity, dim=-2, keepdim=True)
    return torch.exp(log_affinity - rows / 2 - columns / 2)


def symmetric_membership(w: Float[Tensor, "*batch n p"], scale: Scale) -> Float[Tensor, "*batch n n"]:
    r"""P = G^-1/2 exp(s W W^T) G^-1/2 with G the diagonal of row sums: the normalisation of spectral clustering.

    Symmetric and positive semidefinite, with eigenvalues in [0, 1]: each pair of tokens weights each other equally.

    Args:
        w: projections W = Z U_k of the tokens onto one subspace.
        scale: s >= 0, the inverse temperature.
    """
    return balance(_log_affinity(w, scale))


def balanced_membership(w: Float[Tensor, "*batch n p"], scale: Scale) -> Float[Tensor, "*batch n n"]:
    r"""B = P D^-1/2, where P = softmax(s W W^T) row by row and D is the diagonal of the column sums of P.

    Attention in which heavily attended tokens contribute less to each reader; it equals the softmax where every token
    receives the same total attention.
    `balance` of a matrix whose rows add up to 1 already. It need not be symmetric: short tokens read long ones.

    Args:
        w: projections W = Z U_k of the tokens onto one subspace.
        scale: s >= 0, the inverse temperature.
    """
    return balance(torch.log_softmax(_log_affinity(w, scale), dim=-1))


def compression_step(
    w: Float[Tensor, "*batch n p"], mixed: Float[Tensor, "*batch n p"], rate: Scale
) -> Float[Tensor, "*batch n p"]:
    r"""W' = (1 - kappa) W + kappa B W: no singular value rises, and so no coding rate, if ||B||_2 <= 1.

    Args:
        w: projections W of the tokens onto one subspace.
        mixed: B W.
        rate: kappa, in [0, 1].
    """
    return w + rate * (mixed - w)


def decompression_step(
    w: Float[Tensor, "*batch n p"], mixed: Float[Tensor, "*batch n p"], rate: Scale
) -> Float[Tensor, "*batch n p"]:
    r"""W' = (1 + kappa) W - kappa B W, the decoder's step: no singular value falls if ||B||_2 <= 1 and kappa >= 0.

    To first order in kappa it is the inverse of `compression_step` with the same B.

    Args:
        w: projections W of the tokens onto one subspace.
        mixed: B W.
        rate: kappa, at least 0.
    """
    return w - rate * (mixed - w)


def balanced_ssa(w: Float[Tensor, "*batch n p"], scale: Scale) -> Float[Tensor, "*batch n p"]:
    r"""B W with B = `balanced_membership(w, scale)`, in a form that holds less for the backward pass.

    On a CPU that is `BalancedAttention`, in float32 at least: affinities rounded to 8 bits would no longer contract.
    Elsewhere it is `fused_balanced_ssa`. Higher derivatives are those of `plain_balanced_ssa`. Leading dimensions
    (images, heads) are independent of each other.

    Args:
        w: projections W = Z U_k of the tokens onto one subspace.
        scale: s >= 0, the inverse temperature.
    """
    scale = torch.as_tensor(scale, device=w.device)
    fast = _balanced_ssa_by_pieces if w.device.type == "cpu" else fused_balanced_ssa
    plain = lambda w, scale: plain_balanced_ssa(at_least_float(w), scale).to(w.dtype)  # noqa: E731
    with without_autocast(w.device):
        return with_all_derivatives(fast, plain, w, scale)


def _balanced_ssa_by_pieces(
    w: Float[Tensor, "*batch n p"], scale: Float[Tensor, "*#batch 1 1"]
) -> Float[Tensor, "*batch n p"]:
    """`BalancedAttention` with a temperature for each matrix."""
    batch = w if w.ndim > 2 else w[None]
    return BalancedAttention.apply(batch, scale.expand(*batch.shape[:-2], 1, 1)).view_as(w)


def fused_balanced_ssa(w: Float[Tensor, "*batch n p"], scale: Scale) -> Float[Tensor, "*batch n p"]:
    r"""`balanced_ssa` by PyTorch's attention kernels: softmax(S) (D^-1/2 W), after one more pass for D.

    Queries and keys are sqrt(s) W, so that s may be learned. D is that of the queries and keys as they are rounded to
    the precision of W: otherwise the rounded step would not contract. In float16 all is computed in float32, since
    D^-1/2 W may be beyond its range.
    """
    if w.dtype == torch.float16:
        return fused_balanced_ssa(w.float(), scale).to(w.dtype)
    with without_autocast(w.device):
        n, p = w.shape[-2:]
        t = (scale**0.5 * w).to(w.dtype)
        rounded = at_least_float(t).reshape(-1, n, p)
        weights = _ColumnSums.apply(rounded).view(*w.shape[:-1], 1).rsqrt()
        return F.scaled_dot_product_attention(t, t, (w * weights).to(w.dtype), scale=1.0)


def plain_balanced_ssa(w: Float[Tensor, "b h n p"], scale: Float[Tensor, "h 1 1"]) -> Float[Tensor, "b h n p"]:
    # type: (Tensor, Tensor) -> Tensor
    r"""`balanced_ssa` in PyTorch's own functions, P (D^-1/2 W), for TorchScript and exported graphs."""
    t = scale.sqrt().to(w.dtype) * w
    p = torch.softmax(t @ t.transpose(-2, -1), dim=-1)
    return p @ (w * column_sums(p).rsqrt())


class BalancedAttention(torch.autograd.Function):
    r"""O = P D^-1/2 W with P = softmax(s W W^T) and D the column sums of P; query, key and value are one tensor.

    Given dO, with V = D^-1/2 W:

        dV = P^T dO,   dD_j = -1/2 D_j^-3/2 <W_j, dV_j>
        dP = dO V^T + 1 dD^T,   dS = P * (dP - rowsum(P * dP)),   E = (dS + dS^T) W
        dW = D^-1/2 dV + s E,   ds = 1/2 <W, E>

    Only W, s and P are saved. W is cut into pieces and read as it lies in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, w: Float[Tensor, "b *heads n p"], scale: Float[Tensor, "b *heads 1 1"]
    ) -> Float[Tensor, "b *heads n p"]:
        """The output, piece by piece."""
        dtype, memberships, out = _wide(w), [], torch.empty_like(w)
        for w_i, scale_i, out_i in pieces(w, scale, out, dtype=dtype):
            x = as_batch(w_i, dtype)
            t = x * as_batch(scale_i, dtype).sqrt()  # on both sides, so that the product with itself stays symmetric
            p = torch.softmax(t @ t.mT, dim=-1)
            out_i.copy_((p @ (x * column_sums(p).rsqrt())).view_as(out_i))
            if any(ctx.needs_input_grad):
                memberships.append(p)
        ctx.save_for_backward(w, scale, *memberships)
        return out

    @staticmethod
    @once_differentiable  # Its annotation hides that ctx may be named, which the base class allows.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Float[Tensor, "b *heads n p"]
    ) -> tuple[Float[Tensor, "b *heads n p"], Float[Tensor, "b *heads 1 1"]]:
        """The gradients, piece by piece."""
        w, scale, *memberships = ctx.saved_tensors
        dtype, grad_w, grad_scale = _wide(w), torch.empty_like(w), torch.empty_like(scale).contiguous()
        cut = pieces(w, scale, grad_outputs[0], grad_w, grad_scale, dtype=dtype)
        for (w_i, scale_i, grad_out_i, grad_w_i, grad_scale_i), p in zip(cut, memberships, strict=True):
            x, grad_out = as_batch(w_i, dtype), as_batch(grad_out_i, dtype)
            columns = column_sums(p)
            weight = columns.rsqrt()
            grad_v = p.mT @ grad_out
            grad_columns = (-0.5 * weight**3 * (x * grad_v).sum(-1, keepdim=True)).where(_are_free(columns), 0)
            grad_p = torch.baddbmm(grad_columns.mT, grad_out, (x * weight).mT)
            grad_s = softmax_backward(grad_p, p, dtype)
            both = torch.bmm(grad_s, x).baddbmm_(grad_s.mT, x)
            grad_w_i.copy_((weight * grad_v).addcmul_(both, as_batch(scale_i, dtype)).view_as(grad_w_i))
            grad_scale_i.copy_((both * x).sum((-1, -2)).view_as(grad_scale_i) / 2)
        return grad_w, grad_scale


class _ColumnSums(torch.autograd.Function):
    """The column sums of softmax(T T^T), from T alone: P is formed piece by piece, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: Float[Tensor, "b n p"]) -> Float[Tensor, "b n 1"]:
        ctx.save_for_backward(t)
        return torch.cat([column_sums(torch.softmax(t_i @ t_i.mT, dim=-1)) for (t_i,) in pieces(t, dtype=t.dtype)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Float[Tensor, "b n 1"]
    ) -> tuple[Float[Tensor, "b n p"]]:
        (grad_columns,) = grad_outputs
        (t,) = ctx.saved_tensors
        grads = []
        for t_i, grad_i in pieces(t, grad_columns, dtype=t.dtype):
            p_i = torch.softmax(t_i @ t_i.mT, dim=-1)
            grad_p = grad_i.where(_are_free(column_sums(p_i)), 0).mT.expand_as(p_i)
            grad_s = softmax_backward(grad_p, p_i, t.dtype)
            grads.append((grad_s + grad_s.mT) @ t_i)
        return (torch.cat(grads),)


LEAST_COLUMN_SUM = 1e-24  # that of a token which nobody reads, itself included, may underflow to 0


def column_sums(p: Float[Tensor, "*batch n n"], least: float = LEAST_COLUMN_SUM) -> Float[Tensor, "*batch n 1"]:
    # type: (Tensor, float) -> Tensor
    """The diagonal of D: column sums of P, at least `least`. A larger D makes P D^-1/2 a stronger contraction."""
    return p.sum(-2).unsqueeze(-1).clamp(min=least)


def _are_free(columns: Float[Tensor, "b n 1"]) -> Bool[Tensor, "b n 1"]:
    """Which `column_sums` are as they are, not clamped."""
    return columns > LEAST_COLUMN_SUM


def _wide(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _log_affinity(w: Float[Tensor, "*batch n p"], scale: Scale) -> Float[Tensor, "*batch n n"]:
    root = scale**0.5  # on both sides, so that the product of W with itself stays symmetric
    return (root * w) @ (root * w).mT
