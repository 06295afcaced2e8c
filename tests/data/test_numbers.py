"""Which numbers are whole, and within limits."""

import math

import numpy as np
import pytest

from crate_mae.data.numbers import check_whole, is_number
from crate_mae.errors import UserError


def test_whole_numbers_of_any_library_are_taken():
    for number in (1, 5, np.int64(5), 10**9):
        check_whole("--count", number)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "--count is 0, but must be between 1 and 1,000,000,000"),
        (10**5000, "--count is a number of more than 15 digits"),
        (2.5, "--count is 2.5, but must be a whole number"),
        (True, "--count is True, but must be a whole number"),
        ("5", "--count is '5', but must be a whole number"),
    ],
    ids=[
        "too few",
        "5,001 digits",
        "a fraction",
        "a truth value",
        "a text",
    ],
)
def test_others_are_named(value, words):
    with pytest.raises(UserError, match=words):
        check_whole("--count", value)


def test_numbers_between_limits():
    assert is_number(0.5, 0, 1) and is_number(1, 0, 1.0)
    assert not any(is_number(value, 0, 1) for value in (math.nan, math.inf, 1.5, True, "0.5", None, [0]))
