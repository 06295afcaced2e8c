"""Limits of numbers that users give, and their check. Does not import PyTorch, so that commands can use it."""

from numbers import Integral, Real

from crate_mae.errors import UserError

MOST_IMAGES = 10**9  # in a batch, or counted in another way
MOST_THREADS = 1024  # and processes: many more end a process without a message


def is_number(value: object, least: float, most: float, kind: type = Real) -> bool:
    """Whether a value is a number of a kind, Real or Integral, from `least` to `most`; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def check_whole(option: str, value: object, least: int = 1, most: int = MOST_IMAGES) -> None:
    """Raise a `UserError` for a number that is not whole, or out of its range."""
    if is_number(value, least, most, Integral):
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{option} is {value!r}, but must be a whole number from {least} to {most:,}.")
    text = "a number of more than 15 digits" if abs(int(value)) >= 10**15 else str(value)
    raise UserError(f"{option} is {text}, but must be between {least} and {most:,}.")
