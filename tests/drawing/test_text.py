import math

import pytest

from crate_mae.drawing.text import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (999.4, "999"),
        (999.6, "1,000"),
        (-1234.5, "−1,234"),
        (0.00012, "1.2·10^−4"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "nan"),
    ],
)
def test_a_number_has_three_digits(value, text):
    assert number(value) == text
