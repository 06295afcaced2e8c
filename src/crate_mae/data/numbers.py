"""Limits and defaults of numbers that users give, their check, and the interval of a mean. Imports nothing slow."""

import math
from numbers import Integral, Real
from typing import Any

from crate_mae.errors import UserError

MOST_IMAGES = 10**9  # in a batch, or counted in another way
LARGEST_SEED = 2**32 - 1  # that every generator accepts
MIN_CROP = 0.2  # smallest share of an image that a random crop covers
MAX_BAD = 0.01  # share of unreadable images, by default
MOST_THREADS = 1024  # and processes: many more end a process without a message


def is_number(value: Any, least: int | float, most: int | float, kind: type = Real) -> bool:
    """Whether a value is a number of a kind, Real or Integral, from `least` to `most`; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value <= most)


def check_whole(option: str, value: object, least: int = 1, most: int = MOST_IMAGES) -> None:
    """Raise a `UserError` for a number that is not whole, or out of its range."""
    if mistake := describe_not_whole(option, value, least, most):
        raise UserError(mistake)


def describe_not_share(option: str, value: object) -> str | None:
    """What is wrong with a value that should be a share, as a sentence; None if nothing is."""
    return None if is_number(value, 0, 1, Real) else f"{option} is {value!r}, but must be between 0 and 1."


def describe_not_whole(option: str, value: object, least: int = 1, most: int = MOST_IMAGES) -> str | None:
    """What is wrong with a value that should be a whole number in a range, as a sentence; None if nothing is."""
    if is_number(value, least, most, Integral):
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        return f"{option} is {value!r}, but must be a whole number from {least} to {most:,}."
    text = "a number of more than 15 digits" if abs(int(value)) >= 10**15 else str(value)
    return f"{option} is {text}, but must be between {least} and {most:,}."


def student_half_width(std: float, n: int) -> float:
    """Half of Student's 95% interval of a mean, from the standard deviation of its n values (divided by n - 1)."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
