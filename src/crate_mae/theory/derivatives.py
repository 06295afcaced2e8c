"""How the fast forms of the theory's functions are computed and differentiated: piece by piece, and in every way."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from crate_mae.private_torch import is_transformed

_PIECE_BYTES = 2_000_000  # what a core's cache holds; 1 MB and 4 MB were measured to be slower
_PIECE_BYTES_ELSEWHERE = 256_000_000  # a little of a GPU's memory


def with_all_derivatives(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """`fast(*x)`, differentiable as often, and in every way, as `plain(*x)`.

    The kernels and autograd functions that make a training step fast know one derivative, in reverse mode. So the
    gradient of a backward pass that will be differentiated again (`create_graph=True`) is that of the plain form, and
    `torch.func`, forward-mode derivatives and `torch.jit.trace` get the plain form itself.

    Args:
        fast: has a first derivative in reverse mode.
        plain: the same function in PyTorch's differentiable operations.
        x: what both take.
    """
    if torch.compiler.is_compiling():
        return fast(*x)
    if torch.jit.is_tracing() or is_transformed() or any(forward_ad.unpack_dual(x_i).tangent is not None for x_i in x):
        return plain(*x)
    value = fast(*x)
    return _AllDerivatives.apply(value, plain, *x) if value.requires_grad else value


class _AllDerivatives(torch.autograd.Function):
    """Passes the value of a fast form on, and gradients back to it or, if they are to be differentiated, around it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, plain: Callable[..., Tensor], *x: Tensor) -> Tensor:
        ctx.save_for_backward(*x)
        ctx.plain = plain
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        makes_graph = torch.is_grad_enabled()
        if not makes_graph and not is_transformed():  # as many gradients at once are (`is_grads_batched`)
            return grad, None, *[None] * len(ctx.saved_tensors)
        products: Any = torch.func.vjp(lambda *x: ctx.plain(*x).to(grad.dtype), *ctx.saved_tensors)[1]
        return None, None, *products(grad)


def attend_by_pieces(
    ctx: Any, w: Float[Tensor, "b n p"], attend: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Float[Tensor, "b n p"]:
    """Products P V of memberships and values that both depend on W, in pieces of the batch.

    On a CPU a piece of P stays in the cache between the product, the softmax and the second product.

    Args:
        ctx: of the autograd function; W and P are saved for `gradient_by_pieces`.
        w: projections W, a batch of matrices.
        attend: from a piece of W to the pieces of P and V.
    """
    memberships, out = [], torch.empty_like(w)
    with without_autocast(w.device):
        for w_i, out_i in zip(pieces(w), pieces(out), strict=True):
            p_i, v_i = attend(w_i)
            torch.bmm(p_i, v_i, out=out_i)
            if ctx.needs_input_grad[0]:
                memberships.append(p_i)
    ctx.save_for_backward(w, *memberships)
    return out


def gradient_by_pieces(
    ctx: Any, grad_out: Float[Tensor, "b n p"], gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> Float[Tensor, "b n p"]:
    """The gradient with respect to W after `attend_by_pieces`; `gradient` writes a piece of it into its last argument.

    Its arguments are the pieces of W, P, dO and dW.
    """
    w, *memberships = ctx.saved_tensors
    grad_w = torch.empty_like(w)
    with without_autocast(w.device):
        for piece in zip(pieces(w), memberships, pieces(grad_out), pieces(grad_w), strict=True):
            gradient(*piece)
    return grad_w


def pieces(x: Float[Tensor, "b n p"]) -> tuple[Tensor, ...]:
    """Views of a batch, cut so that a piece of its memberships P, b n n, has about `_PIECE_BYTES`."""
    size = _PIECE_BYTES if x.device.type == "cpu" else _PIECE_BYTES_ELSEWHERE
    return x.split(max(1, size // (x.shape[1] ** 2 * x.element_size())))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which tensors keep the precision in which they arrive."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
