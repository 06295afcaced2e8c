"""How the theory's functions are computed: fast forms piece by piece, with all derivatives, and in which precision."""

from collections.abc import Callable, Iterator
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

    Both compute one function. The kernels and autograd functions that make a training step fast know one derivative, in
    reverse mode. So the gradient of a backward pass that will be differentiated again (`create_graph=True`) is that of
    the plain form, and `torch.func`, forward-mode derivatives and `torch.jit.trace` get the plain form itself.
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


def pieces(w: Float[Tensor, "b *heads n p"], *others: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Views of W and of other tensors, cut along their first axis.

    A piece's memberships P, an n x n matrix of the given dtype for each image and head, have about `_PIECE_BYTES`: on a
    CPU they stay in the cache between the product, the softmax and the second product.
    """
    size = _PIECE_BYTES if w.device.type == "cpu" else _PIECE_BYTES_ELSEWHERE
    images = max(1, size // (w.shape[1:-1].numel() * w.shape[-2] * dtype.itemsize))
    return zip(*(x.split(images) for x in (w, *others)), strict=True)


def as_batch(x: Float[Tensor, "*batch n p"], dtype: torch.dtype) -> Float[Tensor, "b n p"]:
    """One batch of matrices, each in one piece of memory (those of heads lie across each other)."""
    return x.to(dtype, memory_format=torch.contiguous_format).flatten(0, -3)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which tensors keep the precision in which they arrive."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def at_least_float(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_float64(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float64, which autocast leaves alone; on the CPU where the device (Apple's MPS) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()
