"""The three probes, on features made by hand and against values computed in another way."""

import math
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from crate_mae.errors import UserError
from crate_mae.evaluation import probes
from crate_mae.evaluation.probes import (
    fewshot_probe,
    knn_accuracy_on_tenth,
    knn_probe,
    linear_probe,
    mean_interval,
    refuse_small_classes,
    wilson_interval,
)


def clouds(images, classes=7, features=11, spread=0.6, seed=0):
    """Features around one centre a class, and labels; the same centres for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, features))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % classes)
    return (centres[labels] + spread * rng.normal(size=(images, features))).astype(np.float32), labels


def test_knn_is_the_weighted_vote_spelled_out():
    train, train_labels = clouds(83)
    test, test_labels = clouds(31, spread=2.5, seed=1)
    result = knn_probe(train, train_labels, test, test_labels, k=13)
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / std, (test - mean) / std
    hits1 = hits5 = 0
    for x, label in zip(test.astype(np.float64), test_labels, strict=True):
        similarity = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        votes = np.zeros(7)
        for i in np.argsort(-similarity)[:13]:
            votes[train_labels[i]] += math.exp(similarity[i] / 0.07)
        order = np.argsort(-votes, kind="stable")
        hits1 += order[0] == label
        hits5 += label in order[:5]
    assert result.top1.value == pytest.approx(hits1 / 31)
    assert result.top5.value == pytest.approx(hits5 / 31)
    assert 0.3 < result.top1.value < result.top5.value < 1, "the example must be neither hopeless nor trivial"


def test_the_tenth_that_layers_are_chosen_on_has_neighbours_among_the_others_alone():
    train, labels = clouds(70, spread=0.01)
    assert knn_accuracy_on_tenth(train, labels, k=3) == 1
    # With labels that say nothing, an image that were its own neighbour would be right.
    assert knn_accuracy_on_tenth(train, np.random.default_rng(0).permutation(labels), k=1) < 0.5
    assert knn_accuracy_on_tenth(train, labels, k=64) is None, "there are 63 others"
    assert knn_accuracy_on_tenth(train[:7], np.arange(7), k=1) is None


def test_knn_by_hand():
    # Means are (2, 2) and deviations (2, 1): standardised, the training images are (-1, -1), (-1, 1), (1, -1), (1, 1).
    train = np.array([[0, 1], [0, 3], [4, 1], [4, 3]], dtype=np.float32)
    labels = np.array([0, 1, 2, 3])
    # (1, 1) becomes (-0.5, -1), nearest in direction to (-1, -1); as it stands it would be nearest to (4, 3).
    # (1, -5) becomes (-0.5, -7), nearest to (-1, -1) again; as it stands, to (4, 1). (5, 9) becomes (1.5, 7).
    test = np.array([[1, 1], [1, -5], [5, 9]], dtype=np.float32)
    assert knn_probe(train, labels, test, np.array([0, 0, 3]), k=1).top1.value == 1


def test_knn_does_not_depend_on_the_units_of_features():
    train, train_labels = clouds(70, spread=1.5)
    test, test_labels = clouds(60, spread=1.5, seed=1)
    plain = knn_probe(train, train_labels, test, test_labels)
    random = np.random.default_rng(5)
    scale, shift = random.uniform(0.01, 100, 11).astype(np.float32), random.normal(size=11).astype(np.float32)
    assert knn_probe(train * scale + shift, train_labels, test * scale + shift, test_labels) == plain
    assert 0.3 < plain.top1.value < 1, "the example must be neither hopeless nor trivial"


def test_a_feature_that_is_the_same_in_all_training_images_changes_nothing():
    train, train_labels = clouds(70, spread=1.5)
    test, test_labels = clouds(60, spread=1.5, seed=1)
    plain = knn_probe(train, train_labels, test, test_labels)
    wider = [np.pad(x, ((0, 0), (0, 1)), constant_values=7.0) for x in (train, test)]
    assert knn_probe(wider[0], train_labels, wider[1], test_labels) == plain


def test_five_classes_have_no_top5():
    train, train_labels = clouds(50, classes=5)
    assert knn_probe(train, train_labels, train, train_labels).top5 is None
    assert linear_probe(train, train_labels, train, train_labels, grid=[0.1]).top5 is None


@pytest.mark.parametrize("k", [0, 51])
def test_an_impossible_k_is_named(k):
    train, labels = clouds(50)
    with pytest.raises(UserError, match=f"{k} neighbours cannot vote among 50 training images"):
        knn_probe(train, labels, train, labels, k=k)


def test_linear_probe_standardises_chooses_c_and_refits_on_everything():
    train, train_labels = clouds(140, spread=1.2)
    test, test_labels = clouds(90, spread=1.2, seed=1)
    result = linear_probe(train, train_labels, test, test_labels, grid=[1e-3, 1e-1, 10.0], seed=3)
    assert set(result.grid) == {1e-3, 1e-1, 10.0}
    assert result.chosen_on == result.grid[result.c] == max(result.grid.values())
    mean, std = train.mean(axis=0), train.std(axis=0)
    oracle = LogisticRegression(C=result.c, max_iter=1000).fit((train - mean) / std, train_labels)
    expected = (oracle.predict((test - mean) / std) == test_labels).mean()
    assert result.top1.value == pytest.approx(expected)
    assert result.converged
    # The held-out tenth is 14 images, so its accuracies are fourteenths.
    assert all(14 * score == pytest.approx(round(14 * score)) for score in result.grid.values())


def test_linear_probe_does_not_depend_on_the_scale_of_features():
    train, train_labels = clouds(140)
    test, test_labels = clouds(60, seed=1)
    scale = np.logspace(-3, 3, 11).astype(np.float32)
    plain = linear_probe(train, train_labels, test, test_labels)
    scaled = linear_probe(train * scale + 5, train_labels, test * scale + 5, test_labels)
    assert scaled.top1.value == pytest.approx(plain.top1.value, abs=0.04)


def test_test_images_never_choose_c():
    train, train_labels = clouds(140, spread=1.5)
    test, test_labels = clouds(60, spread=1.5, seed=1)
    first = linear_probe(train, train_labels, test, test_labels)
    other = linear_probe(train, train_labels, test[::-1] * 3, (test_labels + 1) % 7)
    assert (first.c, first.grid) == (other.c, other.grid)


@pytest.mark.parametrize(("accuracies", "at_edge"), [([0.1, 0.9, 0.2], False), ([0.9, 0.1, 0.2], True)])
def test_a_best_c_at_the_edge_is_reported(monkeypatch, accuracies, at_edge):
    values = iter(accuracies)
    monkeypatch.setattr(probes, "_accuracy", lambda model, x, labels: next(values))
    train, labels = clouds(70)
    result = linear_probe(train, labels, train, labels, grid=[10.0, 0.1, 1.0])
    assert result.grid == dict(zip([0.1, 1.0, 10.0], accuracies, strict=True))
    assert result.c == (0.1 if at_edge else 1.0)
    assert result.is_c_at_edge == at_edge


def test_the_search_ends_where_larger_values_are_no_better():
    train, labels = clouds(700, spread=3.0)
    shuffled = np.random.default_rng(0).permutation(labels)  # nothing to learn: the more freedom, the worse
    result = linear_probe(train, shuffled, train, labels)
    tried = sorted(result.grid)
    assert tried == sorted(probes.C_GRID)[: len(tried)] and len(tried) < len(probes.C_GRID)
    assert result.c not in tried[-probes.PATIENCE :]


def test_of_equal_accuracies_the_more_certain_wins():
    separable, labels = clouds(140, spread=0.01)
    result = linear_probe(separable, labels, separable, labels, grid=[1e-9, 1.0])
    assert result.grid == {1e-9: 1.0, 1.0: 1.0}
    assert result.c == 1.0


def test_a_solver_that_did_not_converge_is_reported_without_a_warning(monkeypatch):
    monkeypatch.setattr(probes, "MOST_ITERATIONS", 2)
    train, labels = clouds(140)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_probe(train, labels, train, labels, grid=[10.0]).converged
        assert not fewshot_probe(train, labels, train, labels, shots=3, draws=2).converged


def test_fewshot_takes_so_many_of_each_class(monkeypatch):
    seen = []

    class Watched(probes.LogisticRegression):
        def __init__(self, x, y):
            seen.append((x.copy(), y))
            super().__init__(x, y)

    monkeypatch.setattr(probes, "LogisticRegression", Watched)
    train, labels = clouds(140)
    test, test_labels = clouds(60, seed=1)
    result = fewshot_probe(train, labels, test, test_labels, shots=3, draws=4, seed=5)
    assert len(result.draws) == len(seen) == 4
    for x, y in seen:
        assert np.bincount(y).tolist() == [3] * 7
        assert len(np.unique(x, axis=0)) == 21, "no image is drawn twice"
    assert not np.array_equal(seen[0][0], seen[1][0])
    assert result.accuracy.value == pytest.approx(np.mean(result.draws))
    assert result.accuracy.low < result.accuracy.value < result.accuracy.high
    assert fewshot_probe(train, labels, test, test_labels, shots=3, draws=4, seed=5) == result
    assert fewshot_probe(train, labels, test, test_labels, shots=3, draws=4, seed=6) != result


def test_more_shots_are_more_accurate():
    train, labels = clouds(280, spread=1.0)
    test, test_labels = clouds(200, spread=1.0, seed=1)
    one, ten = (fewshot_probe(train, labels, test, test_labels, shots=shots).accuracy.value for shots in (1, 10))
    assert 1 / 7 < one < ten


@pytest.mark.parametrize(
    ("probe", "options"), [(linear_probe, {}), (fewshot_probe, {"shots": 2})], ids=["linear", "fewshot"]
)
def test_a_class_with_too_few_images_is_named(probe, options):
    train, labels = clouds(50)
    labels[labels == 4] = 3
    labels[0] = 4
    with pytest.raises(UserError, match=r"Class 4 has 1 training image\(s\), but this probe needs 2 of each"):
        probe(train, labels, train, labels, **options)
    with pytest.raises(UserError, match="Class owl has 1 training"):
        refuse_small_classes(labels, 2, ["a", "b", "c", "d", "owl", "f", "g"])


def test_wilson_interval_by_its_formula():
    # Newcombe (1998), method 3: 81 of 263 is 0.2553 to 0.3662, and 0 of 20 is 0 to 0.1611.
    score = wilson_interval(81, 263)
    assert (score.value, score.low, score.high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert (wilson_interval(0, 20).low, wilson_interval(0, 20).high) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20).high == 1


def test_mean_interval_by_hand():
    # Of 2, 4 and 6 tenths: mean 0.4, deviation 0.2, and Student's t of 2 degrees of freedom is 4.30265.
    score = mean_interval([0.2, 0.4, 0.6])
    half = 4.30265 * 0.2 / math.sqrt(3)
    assert (score.value, score.low, score.high) == pytest.approx((0.4, max(0, 0.4 - half), min(1, 0.4 + half)))
    score = mean_interval([0.4, 0.41, 0.42])
    assert score.high - score.low == pytest.approx(2 * 4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert mean_interval([0.3]) == probes.Score(0.3, 0.0, 1.0)
