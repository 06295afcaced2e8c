r"""Attention derived: the mixing term of a step that compresses tokens is attention in which query = key = value.

A descent step on the subspace rate R^c, with the inverse in the gradient expanded to first order (see
`coding_rate.subspace_coding_rate_gradient`), has two terms for each subspace k, up to constant factors, with
W_k = Z U_k. The first, -W_k, shrinks tokens. The second, (W_k W_k^T) W_k, moves each token towards a sum of the others,
weighted by how similar they are inside the subspace. That is `linear_ssa`. A softmax turns the weights into
memberships, which measure not only how similar two tokens are but whether they belong to the same subspace. That is
`ssa`; over all subspaces, one per head, it is `mssa`.

The published layer, Z + MSSA(LN(Z)), adds the second term and drops -W_k, so it is not a descent step on R^c
(`docs/derivation.md`, section 2). `theory.compression` has a step with both terms, which never raises R^c.

In this package, comments `# type:` are for TorchScript, which cannot read jaxtyping's annotations, and matrices are
transposed by `transpose(-2, -1)` where PyTorch's TorchScript exporter to ONNX goes, which does not know `mT`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_mae.private_torch import softmax_backward
from crate_mae.theory.derivatives import as_batch, pieces, with_all_derivatives, without_autocast
from crate_mae.theory.subspaces import project, unproject


def linear_ssa(w: Float[Tensor, "*batch n p"], scale: float) -> Float[Tensor, "*batch n p"]:
    r"""Attention before the softmax, s (W W^T) W: the term that mixes tokens in the first-order Neumann expansion.

    With W_k = Z U_k and a = p/(n eps^2) the expansion is exactly

        subspace_coding_rate_gradient(z, u, eps, neumann_order=1) = a sum_k (W_k - linear_ssa(W_k, a)) U_k^T.
    """
    return scale * (w @ (w.mT @ w))


def attention_membership(w: Float[Tensor, "*batch n p"], scale: float | None = None) -> Float[Tensor, "*batch n n"]:
    # type: (Tensor, float | None) -> Tensor
    r"""P = softmax(s W W^T), row by row: P[i, j] is the share of token j in what token i moves towards.

    Args:
        w: projections W = Z U_k of the tokens onto one subspace.
        scale: s, the inverse temperature; p^-1/2 if None.
    """
    # The scale goes to W: that is n x p numbers instead of n x n, and keeps half-precision products in range.
    return torch.softmax((_scale(w, scale) * w) @ w.transpose(-2, -1), dim=-1)


def ssa(w: Float[Tensor, "*batch n p"], scale: float | None = None) -> Float[Tensor, "*batch n p"]:
    # type: (Tensor, float | None) -> Tensor
    r"""SSA(W) = softmax(s W W^T) W, subspace self-attention.

    The function is `plain_ssa`; what is computed is one of two forms that hold less for the backward pass and take less
    time: `fused_ssa`, and, in half precision on a CPU, where that is slow, `SymmetricAttention`. Higher derivatives and
    the transforms of `torch.func` take the plain form, see `with_all_derivatives`. It runs in the precision in which
    `w` arrives, also under autocast. Leading dimensions (images, heads) are independent of each other.

    Source: arXiv 2306.01129, section 2.3. There s = 1; the official code, and we by default, take s = p^-1/2.

    Args:
        w: projections W = Z U_k of the tokens onto one subspace.
        scale: s, the inverse temperature; p^-1/2 if None.
    """
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(w, w, w, scale=_scale(w, scale))
    else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
        fast = fused_ssa if w.device.type == "cuda" or w.dtype.itemsize >= torch.float32.itemsize else _symmetric_ssa
        return with_all_derivatives(partial(fast, scale=scale), partial(plain_ssa, scale=scale), w)


def plain_ssa(w: Float[Tensor, "*batch n p"], scale: float | None = None) -> Float[Tensor, "*batch n p"]:
    r"""SSA(W) = softmax(s W W^T) W as it is written."""
    with without_autocast(w.device):
        return attention_membership(w, scale) @ w


def fused_ssa(w: Float[Tensor, "*batch n p"], scale: float | None = None) -> Float[Tensor, "*batch n p"]:
    r"""`ssa` by PyTorch's own attention kernels, with W as query, key and value: softmax(s W W^T) W.

    They hold no n x n matrix in memory, neither forward nor backward (on a GPU: FlashAttention in half precision). The
    gradient of W is the sum of those of query, key and value. On a CPU, in float32, MSSA forward and backward takes as
    long as with `SymmetricAttention`, and forward alone up to a sixth less; in bfloat16 that one is faster by far.
    """
    with without_autocast(w.device):
        return F.scaled_dot_product_attention(w, w, w, scale=_scale(w, scale))


def _symmetric_ssa(w: Float[Tensor, "*batch n p"], scale: float | None = None) -> Float[Tensor, "*batch n p"]:
    batch = w if w.ndim > 2 else w[None]
    with without_autocast(w.device):
        return SymmetricAttention.apply(batch, _scale(w, scale)).view_as(w)


def mssa(z: Float[Tensor, "*batch n d"], subspaces: Float[Tensor, "h d p"]) -> Float[Tensor, "*batch n d"]:
    r"""MSSA(Z | U) = sum_k SSA(Z U_k) U_k^T, multi-head subspace self-attention with tied output projection.

    Source: arXiv 2306.01129, section 2.3, without its constant factor p/(n eps^2), which the official code also leaves
    to learning: it has a free matrix and a bias instead of the U_k^T. As published, this is the mixing term of the
    gradient step alone, without -sum_k W_k U_k^T.

    Args:
        z: tokens Z.
        subspaces: bases U_k, one per head.
    """
    return unproject(ssa(project(z, subspaces)), subspaces)


class SymmetricAttention(torch.autograd.Function):
    r"""O = softmax(s W W^T) W with a backward pass for query, key and value that are one tensor.

    Let S = s W W^T and P = softmax(S), so O = P W. Given dO, the gradient of the loss with respect to O:

        dP = dO W^T                        (W as value is held fixed)
        dS = P * (dP - rowsum(P * dP))     (the softmax)
        dW = P^T dO + s (dS + dS^T) W      (W as value; W on either side of the symmetric product W W^T)

    Only W and P are saved, where ordinary attention saves three projections beside P. On a CPU, forward and backward
    together were measured to be 1.1 (small batches) to 3 times as fast as autograd on the formula.
    """

    @staticmethod
    def forward(ctx: Any, w: Float[Tensor, "b *heads n p"], scale: float) -> Float[Tensor, "b *heads n p"]:
        """The output O = P W, piece by piece."""
        memberships, out = [], torch.empty_like(w)
        for w_i, out_i in pieces(w, out, dtype=w.dtype):
            x = as_batch(w_i, w.dtype)
            p = attention_membership(x, scale)
            out_i.copy_((p @ x).view_as(out_i))
            if ctx.needs_input_grad[0]:
                memberships.append(p)
        ctx.scale = scale
        ctx.save_for_backward(w, *memberships)
        return out

    @staticmethod
    @once_differentiable  # Its annotation hides that ctx may be named, which the base class allows.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Float[Tensor, "b *heads n p"]
    ) -> tuple[Float[Tensor, "b *heads n p"], None]:
        """The gradient dW = P^T dO + s (dS + dS^T) W, piece by piece."""
        w, *memberships = ctx.saved_tensors
        grad_w = torch.empty_like(w)
        cut = pieces(w, grad_outputs[0], grad_w, dtype=w.dtype)
        for (w_i, grad_out_i, grad_w_i), p in zip(cut, memberships, strict=True):
            x, grad_out = as_batch(w_i, w.dtype), as_batch(grad_out_i, w.dtype)
            # rowsum(P * dP) = rowsum(dO * O), but that shorter sum, rounded to bfloat16, was measured to be up to a
            # hundred times less accurate where attention is peaked; the softmax's own kernel sums in float32.
            grad_s = softmax_backward(grad_out @ x.mT, p, w.dtype)
            grad = torch.bmm(p.mT, grad_out)
            grad.baddbmm_(grad_s, x, alpha=ctx.scale).baddbmm_(grad_s.mT, x, alpha=ctx.scale)
            grad_w_i.copy_(grad.view_as(grad_w_i))
        return grad_w, None


def _scale(w: Float[Tensor, "*batch n p"], scale: float | None) -> float:
    # type: (Tensor, float | None) -> float
    return w.shape[-1] ** -0.5 if scale is None else scale
