"""Decode image files, and convert images to a number of channels. Damaged files are refused."""

import io
import warnings

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crate_mae.errors import UserError, first_line

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
GREY_MODES = DEEP_MODES | {"1", "L", "LA", "La"}
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})

# Where Pillow's formats keep what can hold an orientation; reading it costs a third of decoding a 32-pixel JPEG.
_ORIENTATION_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_LONGEST_REASON = 160


class UnreadableImage(Exception):  # noqa: N818 - named after the image; not an error of the program
    """An image that exists but cannot be used: corrupt, truncated, empty, forbidden, or of an unknown format.

    Attributes:
        location: where it is, as `ImageSource.location` describes it.
        reason: one short sentence.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(location, reason)
        self.location = location
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


def decode(content: bytes, location: str) -> Image.Image:
    """Decode a whole image file and turn it upright (EXIF orientation).

    The image keeps its own mode (bit depth, palette, transparency) and `format`; `to_channels` converts it.
    Of an animation the first frame is used. A truncated file is unreadable, never a half-grey image.

    Raises:
        UnreadableImage: for anything that Pillow cannot decode completely.
    """
    if not content:
        raise UnreadableImage(location, "the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            image.load()
            form = image.format
            if any(key in image.info for key in _ORIENTATION_KEYS):
                image = ImageOps.exif_transpose(image)
                image.format = form
    except UnidentifiedImageError as error:
        raise UnreadableImage(location, "not an image of a known format, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(location, f"more than {limit:,} pixels: refused as a decompression bomb") from error
    except Exception as error:  # Pillow's plug-ins raise nearly any type on a damaged file.
        raise UnreadableImage(location, _short(error)) from error
    if image.mode not in GREY_MODES and image.mode not in COLOUR_MODES:
        raise UnreadableImage(location, f"pixels of mode {image.mode} are not supported")
    return image


def channels_of(image: Image.Image | Tensor) -> int:
    """Return the number of channels of an image: 1 for grey of any depth, 3 for colour, `c` for a tensor c hh ww."""
    if isinstance(image, Tensor):
        return image.shape[0]
    return 1 if image.mode in GREY_MODES else 3


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Return (height, width)."""
    return (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else (image.height, image.width)


def to_channels(image: Image.Image | Tensor, channels: int) -> Image.Image | Tensor:
    """Convert to `channels` channels.

    An image of 8 bits or fewer becomes a Pillow image of mode L or RGB: transparent parts become white, colour
    becomes grey by the ITU-R 601 luma. A deeper one becomes a float tensor in [0, 1] by `deep_to_unit`.
    A tensor with the right count passes; between 1 and 3 it is converted in the same way.

    Raises:
        UserError: if the counts do not fit.
    """
    if not isinstance(image, Tensor):
        if image.mode not in DEEP_MODES:
            return _convert_pillow(image, channels)
        image = deep_to_unit(image)
    count = image.shape[0]
    if count == channels:
        return image
    if count == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if count == 3 and channels == 1:
        return tvf.rgb_to_grayscale(image)
    raise _mismatch(count, channels)


def to_tensor(image: Image.Image | Tensor) -> UInt8[Tensor, "c hh ww"] | Float[Tensor, "c hh ww"]:
    """Convert an L or RGB image to a contiguous uint8 tensor; return tensors as they are."""
    if isinstance(image, Tensor):
        return image
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def deep_to_unit(image: Image.Image) -> Float[Tensor, "1 hh ww"]:
    """Scale a grey image of more than 8 bits to [0, 1].

    16-bit modes are divided by 65535. Mode I holds 16-bit files in 32 bits, so it is divided by 65535 too unless a
    value is larger; then by 2^31 - 1. Mode F is taken to be in the first of [0, 1], [0, 255], [0, 65535] that
    holds it. Negative or larger values have no range of their own: they are stretched from minimum to maximum.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    tops = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if high <= top), None)
    if low < 0 or top is None:
        return torch.from_numpy((values - low) / max(high - low, 1e-12))[None]
    return torch.from_numpy(values / np.float32(top))[None]


def _convert_pillow(image: Image.Image, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise _mismatch(channels_of(image), channels)
    wanted = "L" if channels == 1 else "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.has_transparency_data:
            colours = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
        if image.mode == wanted:
            return image
        # Not every mode converts to grey directly (CMYK, YCbCr), but every mode converts to RGB.
        if image.mode not in ("1", "L", "RGB"):
            image = image.convert("RGB")
        return image.convert(wanted)


def _mismatch(found: int, wanted: int) -> UserError:
    return UserError(
        f"The images have {found} channel(s), but {wanted} are required.\n"
        f"Only grey (1) and colour (3) can be converted into each other; build the model with in_chans={found}."
    )


def _short(error: Exception) -> str:
    """The first line of Pillow's message, or the class of the error if it has none."""
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return first_line(error)[:_LONGEST_REASON] if str(error).strip() else f"damaged ({type(error).__name__})"
