"""Multinomial logistic regression with an l2 penalty, in coordinates in which it is well conditioned.

The weights W (f x c) and biases b minimise, over n rows x_i of features with classes y_i,

    F(W, b) = sum_i ( log sum_k exp(z_ik) - z_i,y_i ) + 1/(2 C) ||W||_F^2,      z_i = x_i W + b

which is strictly convex in W, so that every solver finds the same W. For more than two classes F is that of
scikit-learn's `LogisticRegression`. For two, scikit-learn has one vector w in place of W's two columns, where twice
this C has the same effect.

**The coordinates.** The Hessian of F is at most 1/2 X^T X + 1/C in each column of W (Boehning, "Multinomial logistic
regression algorithm", 1992). With X^T X = V diag(s^2) V^T, F is therefore written in the coordinates

    V^T W = diag(s_j^2 / 4 + 1/C)^-1/2 W',

in which this bound is of the order of the identity, and L-BFGS (SciPy's) takes tens of steps where it takes hundreds
for the correlated features of networks (`docs/log.md`). The rotation is computed once for all C.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor

TOLERANCE = 3e-6  # what the solver aims at: the largest entry of the gradient, per image, in the coordinates W'
CONVERGED = 10 * TOLERANCE  # what counts as converged: rounding in float32 may end the search for a smaller one
MOST_ITERATIONS = 1000
_MEMORY = 20  # steps that L-BFGS remembers


class Fit(NamedTuple):
    """A fitted classifier.

    Attributes:
        classes: its classes, sorted.
        weights: W.
        bias: b.
        converged: whether the gradient is below `CONVERGED`.
    """

    classes: Int[np.ndarray, "c"]
    weights: Float[np.ndarray, "f c"]
    bias: Float[np.ndarray, "c"]
    converged: bool

    def logits(self, x: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n c"]:
        """Z = X W + b."""
        return x @ self.weights + self.bias


class LogisticRegression:
    """The regression of some classes on some features, for one C after another, each from the result of the last.

    Args:
        x: features, best standardised: the penalty treats all alike.
        labels: of the same images; at least two classes.
    """

    def __init__(self, x: Float[np.ndarray, "n f"], labels: Int[np.ndarray, "n"]) -> None:
        self.classes, numbers = np.unique(labels, return_inverse=True)
        features = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        self._eigenvalues, self._basis = _principal_axes(features)
        self._rotated = features @ self._basis
        self._numbers = torch.from_numpy(numbers)
        self._weights = np.zeros((len(self._eigenvalues), len(self.classes)))  # V^T W, from which the next fit starts
        self._bias = np.zeros(len(self.classes))

    def fit(self, c: float) -> Fit:
        """Minimise F for one C.

        Args:
            c: C, the inverse strength of the penalty.
        """
        n = len(self._rotated)
        scale = (self._eigenvalues / 4 + 1 / c) ** -0.5
        scales = np.concatenate([scale, [(n / 4) ** -0.5]])[:, None]  # the bias is the coordinate of a feature of ones

        def mean_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            coordinates = flat.reshape(scales.size, -1) * scales
            weights, bias = coordinates[:-1], coordinates[-1]
            loss, by_weights, by_bias = self._cross_entropy(weights, bias)
            gradient = np.concatenate([by_weights + weights / c, by_bias[None]]) * scales
            return (loss + float(np.sum(weights**2)) / (2 * c)) / n, gradient.ravel() / n

        start = np.concatenate([self._weights, self._bias[None]]) / scales
        found = minimize(
            mean_loss,
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MOST_ITERATIONS, "maxcor": _MEMORY, "gtol": TOLERANCE, "ftol": 0.0},
        )
        coordinates = found.x.reshape(scales.size, -1) * scales
        self._weights, self._bias = coordinates[:-1], coordinates[-1]
        weights = self._basis @ torch.from_numpy(self._weights.astype(np.float32))
        converged = bool(np.abs(found.jac).max() <= CONVERGED)
        return Fit(self.classes, weights.numpy(), self._bias.astype(np.float32), converged)

    def _cross_entropy(self, weights: np.ndarray, bias: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The sum over images, and its gradients; products in float32, sums over images in float64."""
        logits = torch.addmm(_float32(bias), self._rotated, _float32(weights))
        log_p = torch.log_softmax(logits, dim=1)
        chosen = self._numbers[:, None]
        loss = -log_p.gather(1, chosen).sum(dtype=torch.float64)
        residual = log_p.exp_()
        residual.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=residual.dtype))
        by_weights = (residual.mT @ self._rotated).mT  # in this order: the other takes MKL 17 times as long
        return float(loss), by_weights.double().numpy(), residual.sum(0, dtype=torch.float64).numpy()


def _principal_axes(x: Float[Tensor, "n f"]) -> tuple[Float[np.ndarray, "r"], Float[Tensor, "f r"]]:
    """Eigenvalues of X^T X and its eigenvectors, r = min(n, f); beyond them, the penalty alone keeps W at zero."""
    if len(x) >= x.shape[1]:
        values, vectors = torch.linalg.eigh((x.mT @ x).double())
        return values.clamp(min=0).numpy(), vectors.float()
    vectors, singular, _ = torch.linalg.svd(x.mT, full_matrices=False)
    return (singular.double() ** 2).numpy(), vectors


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
