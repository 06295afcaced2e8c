"""Which differences the notes call chance: computed by hand, for probes of 10,000 images and for seeds."""

import pytest

from crate_mae.comparison.report import may_be_chance
from crate_mae.comparison.results import difference

IMAGES = 10_000


def of_seeds(name, *values):
    """A score, measured once for each seed."""
    return {seed: {name: value} for seed, value in enumerate(values)}


def around(mean, deviation):
    """Three seeds with this mean and sample standard deviation."""
    return (mean - deviation, mean, mean + deviation)


@pytest.mark.parametrize(("other", "is_chance"), [(0.579, False), (0.599, False), (0.602, True), (0.614, True)])
def test_of_one_seed_a_probe_has_the_error_of_its_images(other, is_chance):
    # sqrt(0.614 * 0.386 + 0.6 * 0.4) / 100 = 0.0069, and 1.96 times that is 0.0135.
    assert may_be_chance("linear", of_seeds("linear", 0.614), of_seeds("linear", other), IMAGES) == is_chance


@pytest.mark.parametrize(("deviation", "is_chance"), [(0.01, False), (0.015, True)])
def test_few_seeds_need_a_larger_difference(deviation, is_chance):
    # The differences of seeds have the mean 0.035 and this deviation: 4.303 (Student's t of 2 degrees of freedom) times
    # deviation / sqrt(3) is 0.0248 and 0.0373. Images give 0.0135, so the bounds are 0.0282 and 0.0396.
    first, other = of_seeds("linear", *around(0.614, deviation)), of_seeds("linear", 0.579, 0.579, 0.579)
    assert may_be_chance("linear", first, other, IMAGES) == is_chance


@pytest.mark.parametrize(("differences", "is_chance"), [((0.1, 0.2, 0.3), True), ((0.19, 0.2, 0.21), False)])
def test_completions_have_the_spread_of_paired_seeds_alone(differences, is_chance):
    # Seeds differ by far more than the two entries do. 4.303 * 0.1 / sqrt(3) is 0.248, and 0.0248 for a tenth of that.
    other = (20.0, 21.0, 22.0)
    first = [psnr + more for psnr, more in zip(other, differences, strict=True)]
    assert may_be_chance("psnr", of_seeds("psnr", *first), of_seeds("psnr", *other), IMAGES) == is_chance


def test_seeds_that_one_entry_lacks_are_left_out_of_the_difference():
    mine, theirs = of_seeds("knn", 0.5, 0.6, 0.7), of_seeds("knn", 0.4, 0.4, 0.4)
    del theirs[1]
    assert difference(mine, theirs, "knn") == (pytest.approx(0.2), pytest.approx(12.706 * 0.1, rel=1e-4))
    assert difference(mine, {2: {"knn": 0.4}}, "knn") == (pytest.approx(0.3), None)
    assert difference(mine, {}, "knn") is None
