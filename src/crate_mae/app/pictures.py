"""Pictures of the app: uploads of visitors, which are not trusted, and examples."""

import base64
import binascii
import io
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from crate_mae.data.decode import UnreadableImage, decode, to_8_bits, to_channels, upright
from crate_mae.data.wrapped import DigitsSource
from crate_mae.errors import UserError

MAX_BYTES = 12 * 2**20
MAX_PIXELS = 25_000_000
MIN_SIDE = 8  # pixels
MAX_ASPECT = 4  # longer pictures are cropped: models take the centre anyway, and scaling them up would fill the memory
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # Pillow reads the multi-picture files of phones (MPO) as JPEG
TOO_LARGE = f"This file is larger than {MAX_BYTES // 2**20} MB: choose a smaller one, or save the picture smaller."

# (title, photograph of scikit-learn, left, top, side in pixels)
_CROPS = (
    ("Flower", "flower.jpg", 170, 20, 390),
    ("Temple", "china.jpg", 190, 55, 330),
    ("Roof", "china.jpg", 10, 130, 230),
)
_DIGIT = 7  # number of the example digit in the test images of `digits`
_SIZE = 64  # of drawn examples, in pixels
_OVERSAMPLING = 4  # least size of a decoded JPEG, relative to what is kept of it


def read_upload(content: bytes, side: int) -> Image.Image:
    """Decode an untrusted picture and scale it down, without writing to a disk.

    Format and size are read from the header first, so that no more than `MAX_PIXELS` pixels are ever decoded. Of an
    animation the first frame is used. The result holds pixels alone: no location, no camera, no colour profile.

    Args:
        content: bytes of the file.
        side: length to which the shorter side is scaled down; smaller pictures stay as they are.

    Returns:
        An upright picture in mode RGB; transparent parts are white.

    Raises:
        UserError: one sentence that tells the visitor what is wrong with the file.
    """
    if len(content) > MAX_BYTES:
        raise UserError(TOO_LARGE)
    width, height = _size_in_header(content)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"This picture has {width:,} x {height:,} pixels, but the app takes {MAX_PIXELS // 10**6} million at "
            "most: save it smaller."
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(f"This picture has {width:,} x {height:,} pixels: each side needs at least {MIN_SIDE}.")
    try:
        image = to_channels(_decode(content, _OVERSAMPLING * side), 3)
    except UnreadableImage as error:
        raise UserError(f"This picture is damaged and cannot be read completely ({error.reason}).") from error
    small = shrink(image if isinstance(image, Image.Image) else to_8_bits(image), side)
    return Image.fromarray(np.asarray(small))  # without metadata of the file


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Crop an RGB picture to an aspect of at most `MAX_ASPECT`, and scale it down to a shorter side of `side`."""
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(length, longest) for length in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    scale = side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def to_uri(png: bytes) -> str:
    """Convert a PNG file to a data: URI, which HTML can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def from_uri(uri: object) -> bytes:
    """Decode the file in a data: URI.

    Raises:
        UserError: if it is not a data: URI, or is too large.
    """
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise UserError("There is no picture: choose one.")
    encoded = uri.partition(",")[2]
    if len(encoded) > 4 * math.ceil(MAX_BYTES / 3):
        raise UserError(TOO_LARGE)
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise UserError("The picture arrived incomplete: choose it again.") from error


def to_png(image: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="PNG")
        return buffer.getvalue()


def _size_in_header(content: bytes) -> tuple[int, int]:
    """Read (width, height) without decoding a pixel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return image.size
    except UnidentifiedImageError as error:
        raise UserError(
            "This file cannot be read as a PNG, JPEG, WebP, GIF or BMP picture, whatever its name."
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"This picture has more pixels than the {MAX_PIXELS // 10**6} million that the app takes: save it smaller."
        ) from error
    except Exception as error:  # Pillow's plug-ins raise nearly any type on a damaged file.
        raise UserError("This picture is damaged: not even its size can be read.") from error


def _decode(content: bytes, side: int) -> Image.Image:
    """Decode a file; a JPEG at 1/2, 1/4 or 1/8 of its size if that leaves its shorter side at least `side` pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.format not in ("JPEG", "MPO"):
        return decode(content, "file")
    image.draft(None, (side, side))
    return upright(image, "file")


class Example(NamedTuple):
    """A picture that comes with the app.

    Attributes:
        title: one word.
        credit: its author or source.
        image: the picture in mode RGB.
    """

    title: str
    credit: str
    image: Image.Image


def examples() -> list[Example]:
    """Return the examples in the order of the app."""
    from sklearn.datasets import load_sample_image  # takes over a second to import

    photographs = [
        Example(
            title,
            "photograph: scikit-learn's sample images, CC BY 2.0",
            Image.fromarray(load_sample_image(name)).crop((left, top, left + side, top + side)),
        )
        for title, name, left, top, side in _CROPS
    ]
    digit: Any = DigitsSource("test").read(_DIGIT)
    digit = digit.convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    return [*photographs, Example("Boat", "drawn for this app", _boat()), Example("Digit", "scikit-learn", digit)]


def _boat() -> Image.Image:
    """Draw a boat on the sea under the sun."""
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
