"""Logistic regression: the minimum is scikit-learn's, whatever the shape and the conditioning of the features."""

import numpy as np
import pytest
import sklearn.linear_model
from scipy.special import log_softmax

from crate_mae.evaluation.probes import LogisticRegression


def correlated(images, features, classes, seed=0):
    """Features whose covariance has eigenvalues spread over six orders of magnitude, as those of networks are."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % classes)
    mixing = np.geomspace(1, 1e-3, features)[:, None] * rng.normal(size=(features, features))
    x = (rng.normal(size=(images, features)) + 2 * rng.normal(size=(classes, features))[labels]) @ mixing
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


def objective(x, labels, weights, bias, c):
    z = x.astype(np.float64) @ weights + bias
    return -log_softmax(z, axis=1)[np.arange(len(x)), labels].sum() + np.sum(weights.astype(np.float64) ** 2) / (2 * c)


@pytest.mark.parametrize(("images", "features"), [(600, 40), (50, 120)], ids=["many images", "fewer than features"])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_the_minimum_is_that_of_scikit_learn(images, features, c):
    x, labels = correlated(images, features, classes=5)
    oracle = sklearn.linear_model.LogisticRegression(C=c, max_iter=20_000, tol=1e-10).fit(x.astype(np.float64), labels)
    regression = LogisticRegression(x, labels)
    regression.fit(30 * c)  # a fit starts from the last one, which must not matter
    fit = regression.fit(c)
    assert fit.converged
    least = objective(x, labels, oracle.coef_.T, oracle.intercept_, c)
    assert objective(x, labels, fit.weights, fit.bias, c) == pytest.approx(least, rel=1e-3)
    agree = fit.classes[fit.logits(x).argmax(1)] == oracle.predict(x)
    assert agree.mean() > 0.99


def test_features_that_never_vary_have_no_weight():
    x, labels = correlated(60, 8, classes=3)
    x[:, 3] = 0
    fit = LogisticRegression(x, labels).fit(1.0)
    assert np.isfinite(fit.weights).all()
    assert np.abs(fit.weights[3]).max() < 1e-5


def test_labels_keep_their_numbers():
    x, labels = correlated(60, 8, classes=3)
    fit = LogisticRegression(x, 10 * labels + 7).fit(1.0)
    assert fit.classes.tolist() == [7, 17, 27]
