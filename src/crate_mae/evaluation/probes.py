"""Probes of frozen features: nearest neighbours, a linear classifier, and a linear classifier from few labels.

All three take features as arrays, independent of networks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from crate_mae.data.numbers import student_half_width
from crate_mae.errors import UserError
from crate_mae.models.config import NEIGHBOURS
from crate_mae.models.features import neighbour_votes

C_GRID = tuple(10.0 ** (power / 2) for power in range(-10, 5))  # 1e-5 to 100
PATIENCE = 2  # values of C in a row without an improvement, after which the search ends: weak regularisation is slow
SHARE_TO_CHOOSE_ON = 0.1
# No images are left to choose it on. Values from 0.1 to 10 change the accuracy on digits and CIFAR-10 by < 2 points.
FEWSHOT_C = 1.0
SCORE = "top-1 (95%)"  # title of the cell with the score
_TOP = 5
_NOT_CONVERGED = "the solver stopped before it converged, so a better fit may exist."

# Of the logistic regression:
TOLERANCE = 3e-6  # what the solver aims at: the largest entry of the gradient, per image, in the coordinates W'
CONVERGED = 10 * TOLERANCE  # what counts as converged: rounding in float32 may end the search for a smaller one
MOST_ITERATIONS = 1000
_MEMORY = 20  # steps that L-BFGS remembers


@dataclass(frozen=True)
class Score:
    """A share between 0 and 1 with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f}% ({100 * self.low:.2f} to {100 * self.high:.2f})"


@dataclass(frozen=True)
class KnnResult:
    """The result of the nearest-neighbour probe.

    Attributes:
        top1: share of validation images whose class has the most votes.
        top5: share whose class is among the five with the most votes; None for at most five classes.
        k: number of neighbours that vote.
        chosen_on: `knn_accuracy_on_tenth`, where layers are compared by it.
    """

    top1: Score
    top5: Score | None
    k: int
    chosen_on: float | None = None

    @property
    def score(self) -> Score:
        """What models are compared by."""
        return self.top1

    def cells(self) -> dict[str, str]:
        """The cells of a table, by their titles."""
        return _top_cells(self.top1, self.top5, self.chosen_on)

    def warnings(self) -> list[str]:
        """Why the score may not be the best possible."""
        return []


@dataclass(frozen=True)
class LinearResult:
    """The result of the linear probe.

    Attributes:
        top1: share of validation images that are classified correctly.
        top5: share whose class is among the five most probable; None for at most five classes.
        chosen_on: accuracy on the tenth of the training images used to choose C, before the final fit.
        c: the inverse strength of regularisation.
        grid: every C that was tried, with its accuracy on that tenth.
        is_c_at_edge: whether the best C is the smallest or largest of the grid, so that a better one may lie beyond.
        converged: whether the solver met its tolerance in the final fit.
    """

    top1: Score
    top5: Score | None
    chosen_on: float
    c: float
    grid: dict[float, float]
    is_c_at_edge: bool
    converged: bool

    @property
    def score(self) -> Score:
        """What models are compared by."""
        return self.top1

    def cells(self) -> dict[str, str]:
        """The cells of a table, by their titles."""
        return {**_top_cells(self.top1, self.top5, self.chosen_on), "C": f"{self.c:.2g}"}

    def warnings(self) -> list[str]:
        """Why the score may not be the best possible."""
        edge = f"the best C ({self.c:.2g}) is at the edge of the grid; a better one may be beyond."
        return [edge] * self.is_c_at_edge + [_NOT_CONVERGED] * (not self.converged)


@dataclass(frozen=True)
class FewshotResult:
    """The result of the few-shot probe.

    Attributes:
        shots: labelled images per class.
        accuracy: mean over draws; its interval is that of the mean, by Student's t over draws.
        draws: accuracy of each draw.
        converged: whether the solver met its tolerance in every draw.
    """

    shots: int
    accuracy: Score
    draws: list[float]
    converged: bool
    chosen_on: ClassVar[None] = None  # there are too few labels to choose a layer on

    @property
    def score(self) -> Score:
        """What models are compared by."""
        return self.accuracy

    def cells(self) -> dict[str, str]:
        """The cells of a table, by their titles."""
        return {"images per class": str(self.shots), SCORE: str(self.accuracy)}

    def warnings(self) -> list[str]:
        """Why the score may not be the best possible."""
        return [_NOT_CONVERGED] * (not self.converged)


def _top_cells(top1: Score, top5: Score | None, chosen_on: float | None) -> dict[str, str]:
    cells = {SCORE: str(top1)}
    if top5 is not None:
        cells["top-5 (95%)"] = str(top5)
    if chosen_on is not None:
        cells["a tenth of training"] = f"{100 * chosen_on:.2f}%"
    return cells


def knn_probe(
    train: Float[np.ndarray, "n f"],
    train_labels: Int[np.ndarray, "n"],
    val: Float[np.ndarray, "k f"],
    val_labels: Int[np.ndarray, "k"],
    *,
    k: int = NEIGHBOURS,
) -> KnnResult:
    """Vote among the k most similar training images, each with the weight exp(cosine similarity / 0.07).

    The vote is `neighbour_votes`. Features are standardised first, as in `linear_probe`: minus their mean, divided by
    their standard deviation, over the training images. Cosines depend on where the origin is, so without this step the
    score depends on units: with all training images of CIFAR-10, raw pixels in [-1, 1] had 46.2% and the same pixels in
    [0, 1] 36.3% (standardised, 46.1%); the features of `crate_mae_micro_cifar10` had 50.1% (standardised, 54.2%). With
    it, pixels and the features of every model are treated alike, and no score changes with the units of a feature.

    Raises:
        UserError: if there are fewer training images than k.
    """
    if not 1 <= k <= len(train):
        raise UserError(f"{k} neighbours cannot vote among {len(train)} training images: give a --k from 1 to that.")

    classes, votes = _votes(train, train_labels, val, k)
    top1, top5 = _top_scores(classes, votes, val_labels)
    return KnnResult(top1, top5, k)


def knn_accuracy_on_tenth(
    train: Float[np.ndarray, "n f"], labels: Int[np.ndarray, "n"], *, k: int = NEIGHBOURS, seed: int = 0
) -> float | None:
    """Accuracy of `knn_probe` on a tenth of the training images, with the others as neighbours.

    Layers are chosen by it, since the best of many scores on validation images is biased. None if the others are fewer
    than k, or a class has a single image.
    """
    if np.unique(labels, return_counts=True)[1].min() < 2:
        return None
    others, tenth = _split(labels, seed)
    if len(others) < k:
        return None
    classes, votes = _votes(train[others], labels[others], train[tenth], k)
    return float(np.mean(classes[votes.argmax(axis=1)] == labels[tenth]))


def linear_probe(
    train: Float[np.ndarray, "n f"],
    train_labels: Int[np.ndarray, "n"],
    val: Float[np.ndarray, "k f"],
    val_labels: Int[np.ndarray, "k"],
    *,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
) -> LinearResult:
    """Multinomial logistic regression on standardised features.

    C is chosen on a stratified tenth of the training images, never on the validation images; then all training
    images are fitted with it. Values are tried from small to large, until two in a row improve neither accuracy nor
    cross entropy on that tenth. Among values with the same accuracy, which are common with few images, the one with the
    smallest cross entropy is chosen.

    Raises:
        UserError: if a class has a single training image, which cannot be in both parts.
    """
    fit, scaler, best, accuracies = fit_linear(train, train_labels, grid=grid, seed=seed)
    top1, top5 = _top_scores(fit.classes, fit.logits(np.asarray(scaler.transform(val))), val_labels)
    return LinearResult(
        top1,
        top5,
        chosen_on=accuracies[best],
        c=best,
        grid=accuracies,
        is_c_at_edge=best in (min(grid), max(grid)),
        converged=fit.converged,
    )


def fit_linear(
    train: Float[np.ndarray, "n f"],
    labels: Int[np.ndarray, "n"],
    *,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
) -> "tuple[Fit, StandardScaler, float, dict[float, float]]":
    """The classifier of `linear_probe`, what standardises features for it, its C, and the accuracy of every C tried."""
    refuse_small_classes(labels, 2)
    fitted, chosen = _split(labels, seed)
    x, x_chosen = _standardised(train[fitted], train[chosen])
    accuracies: dict[float, float] = {}
    losses: dict[float, float] = {}
    path, fruitless = LogisticRegression(x, labels[fitted]), 0
    for c in sorted(grid):
        tried = path.fit(c)
        accuracy = _accuracy(tried, x_chosen, labels[chosen])
        loss = log_loss(labels[chosen], softmax(tried.logits(x_chosen), axis=1), labels=tried.classes)
        improves = accuracy > max(accuracies.values(), default=-1.0) or loss < min(losses.values(), default=math.inf)
        fruitless = 0 if improves else fruitless + 1
        accuracies[c], losses[c] = accuracy, loss
        if fruitless == PATIENCE:
            break
    best = max(accuracies, key=lambda c: (accuracies[c], -losses[c]))
    scaler = StandardScaler().fit(train)
    fit = LogisticRegression(np.asarray(scaler.transform(train)), labels).fit(best)
    return fit, scaler, best, accuracies


def fewshot_probe(
    train: Float[np.ndarray, "n f"],
    train_labels: Int[np.ndarray, "n"],
    val: Float[np.ndarray, "k f"],
    val_labels: Int[np.ndarray, "k"],
    *,
    shots: int,
    draws: int = 20,
    seed: int = 0,
) -> FewshotResult:
    """Logistic regression (C = 1) from a few images of each class, drawn many times.

    Features are standardised over all training images: that needs no labels, and a few images give poor statistics.

    Raises:
        UserError: if a class has fewer training images than `shots`.
    """
    refuse_small_classes(train_labels, shots)
    classes = np.unique(train_labels)
    train, val = _standardised(train, val)
    accuracies, converged = [], True
    for draw in range(draws):
        random = np.random.default_rng([seed, shots, draw])
        chosen = np.concatenate([random.choice(np.flatnonzero(train_labels == c), shots, False) for c in classes])
        fit = LogisticRegression(train[chosen], train_labels[chosen]).fit(FEWSHOT_C)
        converged &= fit.converged
        accuracies.append(_accuracy(fit, val, val_labels))
    return FewshotResult(shots, mean_interval(accuracies), accuracies, converged)


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
    """Multinomial logistic regression with an l2 penalty, in coordinates in which it is well conditioned.

    The weights W (f x c) and biases b minimise, over n rows x_i of features with classes y_i,

        F(W, b) = sum_i ( log sum_k exp(z_ik) - z_i,y_i ) + 1/(2 C) ||W||_F^2,      z_i = x_i W + b

    which is strictly convex in W, so that every solver finds the same W. For more than two classes F is that of
    scikit-learn's `LogisticRegression`. For two, scikit-learn has one vector w in place of W's two columns, where twice
    this C has the same effect.

    **The coordinates.** The Hessian of F is at most 1/2 X^T X + 1/C in each column of W (Boehning, "Multinomial
    logistic regression algorithm", 1992). With X^T X = V diag(s^2) V^T, F is therefore written in the coordinates

        V^T W = diag(s_j^2 / 4 + 1/C)^-1/2 W',

    in which this bound is of the order of the identity, and L-BFGS (SciPy's) takes tens of steps where it takes
    hundreds for the correlated features of networks (`docs/log.md`). The rotation is computed once for all C.

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
        """Minimise F for one C, from the result for the last one on.

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


def refuse_small_classes(labels: Int[np.ndarray, "n"], needed: int, names: Sequence[str] | None = None) -> None:
    """Raise a `UserError` that names a class with fewer images than a probe needs."""
    classes, counts = np.unique(labels, return_counts=True)
    small = [(int(label), int(count)) for label, count in zip(classes, counts, strict=True) if count < needed]
    if small:
        label, count = small[0]
        raise UserError(
            f"Class {label if names is None else names[label]} has {count} training image(s), but this probe needs "
            f"{needed} of each class" + (f" (and so do {len(small) - 1} more classes)." if small[1:] else ".")
        )


def wilson_interval(right: int, total: int) -> Score:
    """A share with Wilson's 95% score interval."""
    z = 1.959963984540054
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Score(share, max(0.0, middle - half), min(1.0, middle + half))


def mean_interval(values: Sequence[float]) -> Score:
    """A mean with Student's 95% interval; for one value, the interval is all of [0, 1]."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Score(mean, 0.0, 1.0)
    half = half_width(values)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half))


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95% interval of the mean of at least two values."""
    return student_half_width(float(np.std(values, ddof=1)), len(values))


def _split(labels: Int[np.ndarray, "n"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nine tenths and a tenth of the training images, with all classes in both; each needs two images."""
    chosen = max(len(np.unique(labels)), round(len(labels) * SHARE_TO_CHOOSE_ON))
    fitted, tenth = train_test_split(np.arange(len(labels)), test_size=chosen, stratify=labels, random_state=seed)
    return np.asarray(fitted), np.asarray(tenth)


def _votes(
    train: Float[np.ndarray, "n f"], labels: Int[np.ndarray, "n"], val: Float[np.ndarray, "k f"], k: int
) -> tuple[Int[np.ndarray, "c"], Float[np.ndarray, "k c"]]:
    """The classes, and the votes for each of them by standardised features; see `neighbour_votes`."""
    classes, numbers = np.unique(labels, return_inverse=True)
    train, val = _standardised(train, val)
    votes = neighbour_votes(*map(torch.from_numpy, (train, numbers, val)), classes=len(classes), neighbours=k)
    return classes, votes.numpy()


def _standardised(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features minus their mean, divided by their standard deviation, over the training images."""
    scaler = StandardScaler().fit(train)
    return np.asarray(scaler.transform(train)), np.asarray(scaler.transform(val))


def _accuracy(fit: Fit, x: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(fit.classes[fit.logits(x).argmax(axis=1)] == labels))


def _top_scores(
    classes: Int[np.ndarray, "c"], scores: Float[np.ndarray, "k c"], labels: Int[np.ndarray, "k"]
) -> tuple[Score, Score | None]:
    """Top-1 and, for more than five classes, top-5; among tied classes, the first counts as more probable."""
    order = classes[np.argsort(-scores, axis=1, kind="stable")]
    hits = order == labels[:, None]
    top1 = wilson_interval(int(hits[:, 0].sum()), len(labels))
    top5 = wilson_interval(int(hits[:, :_TOP].sum()), len(labels)) if len(classes) > _TOP else None
    return top1, top5
