"""The 1,797 handwritten digits of scikit-learn: real images that need no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from crate_mae.data.base import ImageSource
from crate_mae.errors import UserError

TEST_DIGITS = 297


class DigitsSource(ImageSource):
    """Grey 8 x 8 digits; their values 0..16 are scaled to 0..255.

    The splits are defined here: in the order of a permutation with seed 0 the last 297 digits are `test`, the 1,500
    before them `train`. Without a split there are all 1,797, in scikit-learn's order.
    """

    def __init__(self, split: str | None = None) -> None:
        from sklearn.datasets import load_digits  # takes over a second to import

        digits: Any = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        rows = {None: np.arange(len(order)), "train": order[:-TEST_DIGITS], "test": order[-TEST_DIGITS:]}
        if split not in rows:
            raise UserError(f'The digits have no split "{split}": use digits, digits:train or digits:test.')
        self._rows = rows[split]
        self._images = np.rint(digits.images[self._rows] * (255 / 16)).astype(np.uint8)
        labels = digits.target[self._rows].astype(np.int64)
        super().__init__("digits" if split is None else f"digits:{split}", labels, [str(i) for i in range(10)])

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> Image.Image:
        """Digit i in mode L."""
        return Image.fromarray(self._images[i])

    def location(self, i: int) -> str:
        """The number of the digit in `load_digits`."""
        return f"digits row {self._rows[i]}"

    def origins(self) -> Iterator[str]:
        """Their numbers in `load_digits`."""
        return (self.location(i) for i in range(len(self)))

    def fingerprint(self) -> str:
        """The digits never change."""
        return self.name
