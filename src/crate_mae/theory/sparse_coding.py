r"""Sparse coding: one proximal-gradient (ISTA) step on a non-negative lasso, the second half of a CRATE layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def lasso_objective(
    codes: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], dictionary: Float[Tensor, "d d"], threshold: float
) -> Float[Tensor, ""]:
    r"""1/2 ||x - a D^T||^2 + lambda ||a||_1, summed over coordinates and averaged over tokens."""
    residual = x - codes @ dictionary.mT
    return (0.5 * residual.square().sum(-1) + threshold * codes.abs().sum(-1)).mean()


def ista_operator(dictionary: Float[Tensor, "d d"], step_size: float) -> Float[Tensor, "d d"]:
    r"""W = I + eta (D - D^T D)."""
    with torch.autocast(dictionary.device.type, enabled=False):
        operator = torch.addmm(dictionary, dictionary.mT, dictionary, beta=step_size, alpha=-step_size)
        operator.diagonal().add_(1)
    return operator


def apply_ista_operator(
    x: Float[Tensor, "*batch d"], operator: Float[Tensor, "d d"], shift: float
) -> Float[Tensor, "*batch d"]:
    r"""relu(X W - eta lambda)."""
    return F.relu(F.linear(x, operator.mT, operator.new_full(operator.shape[:1], -shift)))


def ista_step(
    x: Float[Tensor, "*batch d"], dictionary: Float[Tensor, "d d"], step_size: float, threshold: float
) -> Float[Tensor, "*batch d"]:
    r"""ISTA(X | D) = relu(X + eta (X D - X D^T D) - eta lambda) = relu(X W - eta lambda)."""
    return apply_ista_operator(x, ista_operator(dictionary, step_size), step_size * threshold)
