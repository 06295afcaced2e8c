"""Pictures from strangers: measured before they are decoded, decoded in memory, and made small at once."""

import base64
import binascii
import io
import math
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tvf

from crate_mae.data.decode import UnreadableImage, decode, to_channels, to_tensor
from crate_mae.errors import UserError

MAX_BYTES = 12 * 2**20
MAX_PIXELS = 25_000_000
MIN_SIDE = 8  # pixels
MAX_ASPECT = 4  # what is longer is cropped: models take the centre anyway, and enlarging a thread would fill the memory
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # Pillow reads the several pictures of a phone (MPO) as JPEG
TOO_LARGE = f"This file is larger than {MAX_BYTES // 2**20} MB: choose a smaller one, or save the picture smaller."


def read_upload(content: bytes, side: int) -> Image.Image:
    """Decode a picture that anybody may have made, and shrink it; nothing touches the disk.

    Its format and size are read from its header first, so that no more than `MAX_PIXELS` pixels are ever decoded. Of an
    animation the first frame is taken. What comes out holds pixels alone: no place, no camera, no colour profile.

    Args:
        content: the file.
        side: length to which the shorter side is scaled down; smaller pictures stay as they are.

    Returns:
        An upright picture in mode RGB; transparency is laid over white.

    Raises:
        UserError: one sentence for whoever chose the file.
    """
    if len(content) > MAX_BYTES:
        raise UserError(TOO_LARGE)
    width, height = _size_in_header(content)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"This picture has {width:,} x {height:,} pixels, and the page takes {MAX_PIXELS // 10**6} million at "
            "most: save it smaller."
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"This picture has {width:,} x {height:,} pixels: below {MIN_SIDE} on a side there is nothing to hide."
        )
    try:
        image = to_channels(decode(content, "file"), 3)
    except UnreadableImage as error:
        raise UserError(f"This picture is damaged, and cannot be read to its end ({error.reason}).") from error
    small = shrink(_to_pillow(image), side)
    return Image.fromarray(np.asarray(small))  # without what else the file said


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
    """A PNG file as the address of a picture, so that a page can hold it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def from_uri(uri: object) -> bytes:
    """The file in an address that begins with "data:".

    Raises:
        UserError: if there is none, or it is too large.
    """
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise UserError("There is no picture: choose one.")
    encoded = uri.partition(",")[2]
    if len(encoded) > 4 * math.ceil(MAX_BYTES / 3):
        raise UserError(TOO_LARGE)
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise UserError("The picture did not arrive whole: choose it again.") from error


def to_png(image: Image.Image) -> bytes:
    """The file of a picture."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="PNG")
        return buffer.getvalue()


def _size_in_header(content: bytes) -> tuple[int, int]:
    """(width, height), without decoding a pixel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return image.size
    except UnidentifiedImageError as error:
        raise UserError(
            "This file is no PNG, JPEG, WebP, GIF or BMP picture that can be read, whatever its name says."
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"This picture has more pixels than the {MAX_PIXELS // 10**6} million that the page takes: save it smaller."
        ) from error
    except Exception as error:  # Pillow's plug-ins raise nearly any type on a damaged file.
        raise UserError("This picture is damaged: not even its size can be read.") from error


def _to_pillow(image: Image.Image | object) -> Image.Image:
    """In 8 bits: pictures of more come as tensors."""
    if isinstance(image, Image.Image):
        return image
    return tvf.to_pil_image((to_tensor(image) * 255).round().byte())  # pyright: ignore[reportArgumentType]
