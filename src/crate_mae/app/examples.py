"""Pictures to begin with: two photographs and a digit of scikit-learn's, and one that is drawn here."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

# (title, photograph of scikit-learn, left, top, side in pixels)
_CUTS = (
    ("Temple", "china.jpg", 190, 55, 330),
    ("Flower", "flower.jpg", 170, 20, 390),
    ("Roof", "china.jpg", 10, 130, 230),
)
_DIGIT = 7  # number of the digit in scikit-learn's test of them
_SIZE = 64  # of what is drawn, in pixels


class Example(NamedTuple):
    """A picture that comes with the page.

    Attributes:
        title: in a word.
        credit: who made it.
        image: in mode RGB.
    """

    title: str
    credit: str
    image: Image.Image


def examples() -> list[Example]:
    """The pictures, in the order in which they are offered."""
    from sklearn.datasets import load_sample_image  # an import of over a second

    photographs = [
        Example(title, "photograph: scikit-learn's sample images, CC BY 2.0", _cut(load_sample_image(name), *box))
        for title, name, *box in _CUTS
    ]
    return [*photographs, Example("Boat", "drawn for this page", _boat()), Example("Digit", "scikit-learn", _digit())]


def _cut(photograph: UInt8[np.ndarray, "hh ww 3"], left: int, top: int, side: int) -> Image.Image:
    return Image.fromarray(photograph).crop((left, top, left + side, top + side))


def _digit() -> Image.Image:
    from crate_mae.data.digits import DigitsSource

    digit: Any = DigitsSource("test").read(_DIGIT)
    return digit.convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)


def _boat() -> Image.Image:
    """A boat on the sea under the sun."""
    large = 4 * _SIZE
    picture = Image.new("RGB", (large, large), "#9fcbe8")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((180, 20, 230, 70), fill="#fff3b8")
    draw.rectangle((0, 165, large, large), fill="#2b628f")
    draw.polygon([(118, 40), (118, 150), (55, 150)], fill="#f7f4ec")
    draw.polygon([(128, 60), (128, 150), (185, 150)], fill="#e2574c")
    draw.line((123, 30, 123, 160), fill="#4a3527", width=7)
    draw.polygon([(40, 160), (210, 160), (180, 200), (70, 200)], fill="#7a4a2b")
    return picture.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
