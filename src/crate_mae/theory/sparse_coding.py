r"""Sparse coding: the step that writes tokens in few atoms of a dictionary, the second half of a CRATE layer.

A layer looks for codes A >= 0 of its tokens X under the dictionary D, the minimum of a non-negative lasso

    1/2 ||X - A D^T||^2 + lambda ||A||_1 ,

and takes one proximal-gradient (ISTA) step from A = X. The gradient of the smooth half at A is -(X - A D^T) D; the
proximal map of eta lambda ||A||_1 over A >= 0 is A -> relu(A - eta lambda). Together:

    ISTA(X | D) = relu(X + eta (X D - X D^T D) - eta lambda) = relu(X W - eta lambda),   W = I + eta (D - D^T D).

The first form is how the papers (arXiv 2306.01129, section 2.4) and the official code take it, in three products of
tokens and dictionary; the second, which we use, takes one. D^T D costs d^3, little beside the n d^2 of many tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_mae.theory.derivatives import at_least_float, with_all_derivatives, without_autocast


def lasso_objective(
    codes: Float[Tensor, "*batch m"], x: Float[Tensor, "*batch d"], dictionary: Float[Tensor, "d m"], threshold: float
) -> Float[Tensor, ""]:
    r"""1/2 ||x - a D^T||^2 + lambda ||a||_1, summed over coordinates, averaged over tokens.

    Args:
        codes: codes A, one row per token; the theory asks for A >= 0, which is not checked.
        x: tokens X.
        dictionary: D; row j of D^T is the atom that code j multiplies.
        threshold: lambda.
    """
    residual = x - codes @ dictionary.mT
    return (0.5 * residual.square().sum(-1) + threshold * codes.abs().sum(-1)).mean()


def ista_operator(dictionary: Float[Tensor, "d d"], step_size: float) -> Float[Tensor, "d d"]:
    # type: (Tensor, float) -> Tensor
    r"""W = I + eta (D - D^T D): what an ISTA step started at A = X does to tokens before its threshold.

    Under autocast it is formed in half precision, in which it is then multiplied with tokens: on tokens of variance 1
    that errs 3.0e-3 where the operator formed in float32 errs 2.9e-3, and gradients 2.9e-2 where three products of
    tokens, all in bfloat16, err 3.1e-2. A model in `eval()` can form it once for all.
    """
    if torch.jit.is_scripting():
        return _ista_operator(dictionary, step_size)
    else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
        return with_all_derivatives(
            partial(_IstaOperator.apply, step_size), partial(_ista_operator, step_size=step_size), dictionary
        )


def _ista_operator(dictionary: Float[Tensor, "d d"], step_size: float) -> Float[Tensor, "d d"]:
    # type: (Tensor, float) -> Tensor
    operator = torch.addmm(dictionary, dictionary.t(), dictionary, beta=step_size, alpha=-step_size)
    return operator + torch.eye(dictionary.shape[0], dtype=operator.dtype, device=operator.device)


class _IstaOperator(torch.autograd.Function):
    r"""W = I + eta (D - D^T D), with one product in its backward pass where autograd takes two.

    A change of D by dD changes <G, W> by eta <G, dD - dD^T D - D^T dD>, so that for G the gradient with respect to W,
    that with respect to D is eta (G - D (G + G^T)).
    """

    @staticmethod
    def forward(ctx: Any, step_size: float, dictionary: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        """The operator."""
        ctx.save_for_backward(dictionary)
        ctx.step_size = step_size
        return _ista_operator(dictionary, step_size)

    @staticmethod
    @once_differentiable  # Its annotation hides that ctx may be named, which the base class allows.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Float[Tensor, "d d"]
    ) -> tuple[None, Float[Tensor, "d d"]]:
        """The gradient eta (G - D (G + G^T)), in the precision in which the operator was formed."""
        (grad,) = grad_outputs
        (dictionary,) = ctx.saved_tensors
        eta = ctx.step_size
        return None, torch.addmm(grad, dictionary.to(grad.dtype), grad + grad.mT, beta=eta, alpha=-eta)


def apply_ista_operator(
    x: Float[Tensor, "*batch d"], operator: Float[Tensor, "d d"], shift: float
) -> Float[Tensor, "*batch d"]:
    # type: (Tensor, Tensor, float) -> Tensor
    r"""relu(X W - eta lambda), with `operator` W and `shift` eta lambda."""
    # The identity stays inside W: taking it out, X + X (W - I), would spare bfloat16 one rounding (relative error
    # 1.1e-3 instead of 2.8e-3 forward, the same backward, where three bfloat16 products err more), but makes the step
    # up to a quarter slower and its output, with all that follows, float32.
    # The threshold is taken in place, since the backward pass of a linear map does not ask for its output. Tokens are
    # rows of one matrix meanwhile: what a linear map gives for more dimensions is a view, and autograd copies all of it
    # four times to follow a change in place of a view.
    return ista_preactivation(x.reshape(-1, x.shape[-1]), operator, shift).relu_().view(x.shape)


def ista_preactivation(
    x: Float[Tensor, "*batch d"], operator: Float[Tensor, "d m"], shift: float
) -> Float[Tensor, "*batch m"]:
    # type: (Tensor, Tensor, float) -> Tensor
    r"""X W - eta lambda; `apply_ista_operator` returns its positive part."""
    return F.linear(x, operator.t(), operator.new_full(operator.shape[1:], -shift))


def ista_step(
    x: Float[Tensor, "*batch d"], dictionary: Float[Tensor, "d d"], step_size: float, threshold: float
) -> Float[Tensor, "*batch d"]:
    r"""ISTA(X | D) = relu(X + eta (X D - X D^T D) - eta lambda), computed as relu(X W - eta lambda).

    From X >= 0 and with eta <= 1/||D||_2^2 the step does not raise `lasso_objective`.

    Args:
        x: tokens X, which are also the codes the step starts from.
        dictionary: D.
        step_size: eta.
        threshold: lambda.
    """
    return apply_ista_operator(x, ista_operator(dictionary, step_size), step_size * threshold)


def sparse_codes(
    x: Float[Tensor, "*batch d"],
    dictionary: Float[Tensor, "d m"],
    step_size: float,
    threshold: float,
    steps: int,
    *,
    start: Float[Tensor, "*batch m"] | None = None,
) -> Float[Tensor, "*batch m"]:
    r"""`steps` ISTA iterations from A = 0, or from `start`: A <- relu(A + eta (X - A D^T) D - eta lambda).

    For dictionaries of any number of atoms m. With eta <= 1/||D||_2^2 no iteration raises `lasso_objective`, and the
    limit is its minimum over A >= 0. Two iterations with m = 4 d are the sparse-coding step of CRATE-alpha (Yang et
    al., "Scaling White-Box Transformers for Vision", arXiv 2405.20299, section 3).

    Args:
        x: tokens X.
        dictionary: D, one atom a column.
        step_size: eta.
        threshold: lambda.
        steps: number of iterations, at least 1.
        start: codes A to start from; 0 if None. `ista_step` is one iteration from A = X.
    """
    correlation = x @ dictionary
    codes = F.relu(step_size * correlation - step_size * threshold) if start is None else start
    for _ in range(steps - 1 if start is None else steps):
        residual_correlation = correlation - codes @ dictionary.mT @ dictionary
        codes = F.relu(codes + step_size * residual_correlation - step_size * threshold)
    return codes


def ista_from_zero(
    x: Float[Tensor, "*batch d"],
    operator: Float[Tensor, "d m"],
    gram: Float[Tensor, "m m"] | None,
    shift: float,
    steps: int,
) -> Float[Tensor, "*batch m"]:
    # type: (Tensor, Tensor, Tensor | None, float, int) -> Tensor
    r"""`sparse_codes` from A = 0, with the products of dictionaries formed once for all tokens.

        A_1 = relu(C),   A_t+1 = relu(C + A_t - A_t N),   C = X (eta D) - eta lambda,   N = eta D^T D.

    One product of tokens a step instead of two. Unrolled like this, ISTA is a recurrent network (Gregor and LeCun,
    "Learning Fast Approximations of Sparse Coding", ICML 2010), which learns I - N by itself; here it stays that of D.
    The identity is not put into the matrix: in bfloat16, A - A N errs 3.9e-3 on a trained layer's tokens where
    A (I - N) errs up to 1e-2, since the diagonal of I - N is rounded, and `sparse_codes` 5.5e-3.

    Args:
        x: tokens X.
        operator: eta D.
        gram: N; None for a single step, which does not need it.
        shift: eta lambda.
        steps: number of iterations, at least 1.
    """
    correlation = ista_preactivation(x, operator, shift)
    codes = F.relu(correlation)
    if gram is not None:
        for _ in range(steps - 1):
            codes = F.relu(correlation + codes - codes @ gram)
    return codes


def scaled_gram(dictionary: Float[Tensor, "d m"], step_size: float) -> Float[Tensor, "m m"]:
    # type: (Tensor, float) -> Tensor
    r"""N = eta D^T D: by how much a step lowers each code for what the others, and itself, already explain."""
    if torch.jit.is_scripting():
        return _scaled_gram(dictionary, step_size)
    else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
        return with_all_derivatives(
            partial(_ScaledGram.apply, step_size), partial(_scaled_gram, step_size=step_size), dictionary
        )


def _scaled_gram(dictionary: Float[Tensor, "d m"], step_size: float) -> Float[Tensor, "m m"]:
    # type: (Tensor, float) -> Tensor
    return step_size * (dictionary.t() @ dictionary)


class _ScaledGram(torch.autograd.Function):
    r"""N = eta D^T D, with one product in its backward pass, eta D (G + G^T), where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, step_size: float, dictionary: Float[Tensor, "d m"]) -> Float[Tensor, "m m"]:
        """The scaled Gram matrix."""
        ctx.save_for_backward(dictionary)
        ctx.step_size = step_size
        return _scaled_gram(dictionary, step_size)

    @staticmethod
    @once_differentiable  # as above
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Float[Tensor, "m m"]
    ) -> tuple[None, Float[Tensor, "d m"]]:
        """The gradient, in the precision in which the matrix was formed."""
        (grad,) = grad_outputs
        (dictionary,) = ctx.saved_tensors
        return None, ctx.step_size * (dictionary.to(grad.dtype) @ (grad + grad.mT))


class SingularPair(NamedTuple):
    """Unit vectors u and v with D v = sigma u for the largest singular value sigma = u^T D v = ||D||_2."""

    u: Float[Tensor, "d"]
    v: Float[Tensor, "m"]


@torch.no_grad()
def top_singular_pair(dictionary: Float[Tensor, "d m"], iterations: int | None = None) -> SingularPair:
    r"""The directions of the largest singular value. ||D||_2 = u^T D v then has the right gradient, u v^T, too.

    Args:
        dictionary: D.
        iterations: of the power method on D^T D, from a fixed start: u^T D v is an estimate of ||D||_2 from below, at a
            cost of 2 d m multiplications an iteration. None computes the singular value decomposition.
    """
    if iterations is None:
        u, _, vh = torch.linalg.svd(at_least_float(dictionary), full_matrices=False)
        return SingularPair(u[:, 0].to(dictionary.dtype), vh[0].to(dictionary.dtype))
    # A start in which all atoms take part, with signs of no pattern: the sines of square numbers.
    atoms = torch.arange(dictionary.shape[1], device=dictionary.device, dtype=torch.float32)
    v = F.normalize(torch.sin(atoms.square()).to(dictionary.dtype), dim=0)
    with without_autocast(dictionary.device):  # which would round D anew for every product
        for _ in range(iterations):
            v = F.normalize(dictionary.t() @ (dictionary @ v), dim=0)
        return SingularPair(F.normalize(dictionary @ v, dim=0), v)


def bounded_dictionary(
    dictionary: Float[Tensor, "d m"], step_size: float, norm: Float[Tensor, ""]
) -> Float[Tensor, "d m"]:
    # type: (Tensor, float, Tensor) -> Tensor
    r"""D scaled down, where need be, to eta ||D||_2^2 <= 1: what an ISTA step needs to descend from any feasible code.

    With that bound a step from A >= 0 to A' = relu(A + eta (X - A D^T) D - eta lambda) has

        F(A') <= F(A) - (1/eta - ||D||_2^2 / 2) ||A' - A||^2 <= F(A) - 1/(2 eta) ||A' - A||^2,

    F being `lasso_objective` (the sufficient decrease of proximal gradient steps). The first bound still
    guarantees descent while eta ||D||_2^2 <= 2: the norm may be underestimated by a factor of up to sqrt(2).

    Args:
        dictionary: D.
        step_size: eta.
        norm: ||D||_2, see `top_singular_pair`.
    """
    # Not a division, whose derivative makes three more matrices of this size.
    return dictionary * (step_size**0.5 * norm).clamp(min=1).reciprocal()
