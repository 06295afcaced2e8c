"""Which differences the notes call chance: computed by hand, for probes of 10,000 images and for seeds."""

import pytest

from crate_mae.comparison.report import may_be_chance
from crate_mae.comparison.results import spread

IMAGES = 10_000


def of_seeds(name, *values):
    """A score, measured once for each seed."""
    found = spread([{name: value} for value in values], name)
    assert found is not None
    return found


def around(mean, deviation):
    """Three seeds with this mean and sample standard deviation."""
    return (mean - deviation, mean, mean + deviation)


@pytest.mark.parametrize(("other", "is_chance"), [(0.579, False), (0.599, False), (0.602, True), (0.614, True)])
def test_of_one_seed_a_probe_has_the_error_of_its_images(other, is_chance):
    # sqrt(0.614 * 0.386 + 0.6 * 0.4) / 100 = 0.0069, and 1.96 times that is 0.0135.
    assert may_be_chance("linear", of_seeds("linear", 0.614), of_seeds("linear", other), IMAGES) == is_chance


@pytest.mark.parametrize(("deviation", "is_chance"), [(0.01, False), (0.015, True)])
def test_few_seeds_need_a_larger_difference(deviation, is_chance):
    # Images give 0.0069. With seeds of deviation 0.01 the standard error is sqrt(0.0069^2 + 2 * 0.01^2 / 3) = 0.0107,
    # with 0.015 it is 0.0141; times 2.776, Student's t of 4 degrees of freedom: 0.0297 and 0.0391. The second is more
    # than the difference of 0.035, though two standard errors, 0.0281, are less.
    first, other = (of_seeds("linear", *around(mean, deviation)) for mean in (0.614, 0.579))
    assert may_be_chance("linear", first, other, IMAGES) == is_chance


@pytest.mark.parametrize(("difference", "is_chance"), [(0.26, False), (0.19, True)])
def test_completions_have_the_spread_of_seeds_alone(difference, is_chance):
    # sqrt(2 * 0.1^2 / 3) = 0.0816, times 2.776: 0.227.
    first, other = (of_seeds("psnr", *around(mean, 0.1)) for mean in (21.0, 21.0 + difference))
    assert may_be_chance("psnr", first, other, IMAGES) == is_chance
