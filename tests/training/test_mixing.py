"""Mixup and CutMix of neighbours, and the share of labels: functions of the seed."""

import random

import numpy as np
import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.training.finetuning import Mixing
from crate_mae.training.images import stratified_share

IMAGES = torch.randn(12, 3, 7, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])


def by_content(images, targets):
    """Rows in an order that does not depend on the order they came in."""
    rows = torch.cat([images.flatten(1), targets], dim=1)
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("cuts", [(6, 6), (4, 8), (2, 2, 8)])
def test_how_a_batch_is_divided_does_not_matter(mixup, cutmix, cuts):
    mixing = Mixing(mixup, cutmix, label_smoothing=0.1, num_classes=5, seed=3)
    for step in range(4):
        whole = by_content(*mixing(step, IMAGES, LABELS))
        parts = [mixing(step, *pair) for pair in zip(IMAGES.split(cuts), LABELS.split(cuts), strict=True)]
        divided = by_content(*(torch.cat(rows) for rows in zip(*parts, strict=True)))
        torch.testing.assert_close(whole, divided)


def test_neighbours_are_mixed_and_targets_are_their_shares():
    mixing = Mixing(0.8, 0.0, label_smoothing=0.0, num_classes=12, seed=0)
    mixed, targets = mixing(5, IMAGES, torch.arange(12))
    torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", targets, IMAGES))
    assert all({int(i) // 2 for i in row.nonzero()} == {int(row.argmax()) // 2} for row in targets)
    assert (targets.max(dim=1).values < 1).all()


def test_steps_and_seeds_differ_and_nobody_elses_randomness_is_touched():
    mixing = Mixing(0.8, 1.0, label_smoothing=0.1, num_classes=5, seed=3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = mixing(1, IMAGES, LABELS)[0]
    assert torch.equal(first, mixing(1, IMAGES, LABELS)[0])
    assert not torch.equal(first, mixing(2, IMAGES, LABELS)[0])
    other = Mixing(0.8, 1.0, label_smoothing=0.1, num_classes=5, seed=4)
    assert not torch.equal(first, other(1, IMAGES, LABELS)[0])
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_without_mixing_an_odd_batch_will_do_and_targets_are_smoothed():
    images, targets = Mixing(0.0, 0.0, label_smoothing=0.1, num_classes=5, seed=0)(0, IMAGES[:3], LABELS[:3])
    assert torch.equal(images, IMAGES[:3])
    torch.testing.assert_close(targets, 0.9 * torch.eye(5)[:3] + 0.02)


def test_a_share_of_the_labels_is_stratified_fixed_by_the_seed_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 40, 10]))
    names = ["a", "b", "c"]
    small, large = stratified_share(labels, names, 0.1, 7), stratified_share(labels, names, 0.3, 7)
    assert np.bincount(labels[small]).tolist() == [10, 4, 1]
    assert np.bincount(labels[large]).tolist() == [30, 12, 3]
    assert set(small) < set(large)
    assert small.tolist() == sorted(small) == stratified_share(labels, names, 0.1, 7).tolist()
    assert small.tolist() != stratified_share(labels, names, 0.1, 8).tolist()


def test_classes_left_without_an_image_are_named():
    labels = np.repeat([0, 1, 2], [100, 40, 10])
    with pytest.raises(UserError, match=r"--labels 0.01 leaves no image of b \(40\), c \(10\)"):
        stratified_share(labels, ["a", "b", "c"], 0.01, 0)
