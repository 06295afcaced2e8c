"""Decode image files, and convert images to a number of channels. Damaged files are refused.

All images are opened here, with a fixed list of formats: Pillow reads others, and one of them, EPS, runs a program.
"""

import contextlib
import functools
import io
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crate_mae.errors import UserError, and_more, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow reads the MPO files of phones as JPEG
_JPEG, _PNM = (".jpg", ".jpeg", ".jfif", ".jpe", ".mpo"), (".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
SUFFIXES = (*_JPEG, ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_PNM)
# Formats that are read on some machines: their suffixes, and what else reads them.
OPTIONAL = {
    "AVIF": ((".avif",), "pip install --upgrade pillow"),
    "HEIF": ((".heic", ".heif", ".hif"), "pip install pillow-heif"),
}
# Images that neither reads. Pillow itself has a list of those that it does.
_OTHER_IMAGES = frozenset(
    {".jxl", ".svg", ".raw", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"}
)
MOST_BYTES = 2**29  # of an encoded image
MOST_PIXELS = 2**26  # of a decoded one: 8,192 x 8,192, up to a gigabyte while it is converted

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
UNBOUNDED_MODES = frozenset({"I", "F"})
GREY_MODES = DEEP_MODES | {"1", "L", "LA", "La"}
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})

# Where Pillow's formats keep what can hold an orientation; reading it costs a third of decoding a 32-pixel JPEG.
_ORIENTATION_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_LONGEST_REASON = 160
_LARGEST_VALUE = 1e37  # so that the difference of two is finite in float32


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


@functools.cache
def optional_formats() -> tuple[str, ...]:
    """The `OPTIONAL` formats that are read here: AVIF by most builds of Pillow, HEIF with the extra `heic`.

    The first call makes Pillow's plug-in for HEIF known to Pillow.
    """
    found = ["AVIF"] if "avif" in features.modules and features.check("avif") else []
    with contextlib.suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]  # an extra

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    return tuple(found)


def image_suffixes() -> tuple[str, ...]:
    """The suffixes of files that are read here, in lower case."""
    return SUFFIXES + tuple(suffix for form in optional_formats() for suffix in OPTIONAL[form][0])


def may_be_image(suffix: str) -> bool:
    """Whether files with this suffix are mostly images, whether they are read here or not."""
    optional = (known for suffixes, _ in OPTIONAL.values() for known in suffixes)
    return suffix in Image.registered_extensions() or suffix in _OTHER_IMAGES or suffix in optional


def describe_unread(counts: Mapping[str, int], most: int = 8) -> str:
    """Describe files that are not read, images first, in up to `most` kinds; empty for none.

    Such as "12 files are not read: 9 .heic (pip install pillow-heif), 3 .cr2". They are counted by suffix, and folders
    of the system by name with "/".
    """
    remedies = {suffix: f" ({remedy})" for suffixes, remedy in OPTIONAL.values() for suffix in suffixes}
    files = sorted((kind for kind in counts if not kind.endswith("/")), key=lambda kind: not may_be_image(kind))
    folders = [f"{counts[kind]:,} {kind}" for kind in counts if kind.endswith("/")]
    found = []
    if files:
        total = sum(counts[kind] for kind in files)
        kinds = [f"{counts[kind]:,} {kind or 'without a suffix'}{remedies.get(kind, '')}" for kind in files]
        found.append(f"{total:,} file{'s are' if total > 1 else ' is'} not read: {and_more(kinds, most)}")
    if folders:
        found.append(f"folders of the system are not read: {and_more(folders, most)}")
    return "; ".join(found)


def decode(content: bytes, location: str) -> Image.Image:
    """Decode a whole image file of one of the `FORMATS` and turn it upright (EXIF orientation).

    The image keeps its own mode (bit depth, palette, transparency) and `format`; `to_channels` converts it.
    Of an animation the first frame is used. A truncated file is unreadable, never a half-grey image, and so is a PNG
    file whose pixels do not match their checksum; the other formats have none that Pillow checks. A JPEG file of more
    than `MOST_PIXELS` pixels is decoded at 1/2, 1/4 or 1/8 of its size; files of other formats are refused.

    Raises:
        UnreadableImage: for anything that cannot be decoded completely.
    """
    if not content:
        raise UnreadableImage(location, "the file is empty (0 bytes)")
    if len(content) > MOST_BYTES:
        raise UnreadableImage(location, f"{len(content):,} bytes are more than the {MOST_BYTES:,} that are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS + optional_formats())
    except UnidentifiedImageError as error:
        raise UnreadableImage(location, _why_unknown(content)) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(location, f"more than {limit:,} pixels: refused as a decompression bomb") from error
    except Exception as error:  # Pillow's plug-ins raise nearly any type on a damaged file.
        raise UnreadableImage(location, _short(error)) from error
    if image.format == "PNG" and not _png_checksums_match(content):
        raise UnreadableImage(location, "damaged: the checksum of its pixels is wrong")
    return upright(image, location)


def upright(image: Image.Image, location: str) -> Image.Image:
    """Load an open image completely, and turn it upright, as `decode` does.

    Raises:
        UnreadableImage: if it cannot be loaded, is of another format or mode, or has too many pixels.
    """
    form = image.format
    if not all(image.size):
        raise UnreadableImage(location, f"it has no pixels ({image.width} x {image.height})")
    known = FORMATS + optional_formats()
    if isinstance(image, ImageFile.ImageFile) and form not in (*known, "MPO"):
        raise UnreadableImage(location, f"the format {form} is not one of {', '.join(known)}: convert it")
    try:
        with warnings.catch_warnings(), _truncated_images_refused():
            warnings.simplefilter("ignore")
            if isinstance(image, ImageFile.ImageFile):
                _limit_pixels(image, location)
            image.load()
            if any(key in image.info for key in _ORIENTATION_KEYS):
                image = ImageOps.exif_transpose(image)
                image.format = form
    except UnreadableImage:
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(location, _short(error)) from error
    if image.mode not in GREY_MODES and image.mode not in COLOUR_MODES:
        raise UnreadableImage(location, f"pixels of mode {image.mode} are not supported")
    return image


def _why_unknown(content: bytes) -> str:
    """Why no format was found, whatever the name of the file: phones save HEIC that is then renamed to .jpg."""
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    form = "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    if form and form not in optional_formats():
        return f"a file of the format {form}, which is not read here: {OPTIONAL[form][1]}"
    if content.startswith(_JPEG_XL):
        return "a file of the format JPEG XL, which is not read: convert it"
    return "not an image of a known format, or its header is damaged"


def _limit_pixels(image: ImageFile.ImageFile, location: str) -> None:
    """Have a large JPEG decoded at a fraction of its size, and refuse what is still too large."""
    width, height = image.size
    for scale in (2, 4, 8):
        if image.width * image.height <= MOST_PIXELS:
            return
        image.draft(None, (width // scale, height // scale))
    if image.width * image.height > MOST_PIXELS:
        raise UnreadableImage(
            location, f"{width:,} x {height:,} pixels are more than the {MOST_PIXELS:,} that are read: save it smaller"
        )


class _Inside:
    """How many threads are inside `_truncated_images_refused`, and what the setting was before the first."""

    lock = threading.Lock()
    threads = 0
    before = False


@contextlib.contextmanager
def _truncated_images_refused() -> Iterator[None]:
    """Switch off Pillow's LOAD_TRUNCATED_IMAGES, which other libraries switch on for the whole process."""
    with _Inside.lock:
        if not _Inside.threads:
            _Inside.before = ImageFile.LOAD_TRUNCATED_IMAGES
        _Inside.threads += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.threads -= 1
            if not _Inside.threads:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Inside.before


def _png_checksums_match(content: bytes) -> bool:
    """Check what Pillow does not: the checksums of the chunks of pixels."""
    view, at = memoryview(content), 8
    while at + 12 <= len(content):
        length, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end = at + 8 + length
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        at = end + 4
    return True


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
        if image.mode not in GREY_MODES and image.mode not in COLOUR_MODES:
            raise UserError(f"Pixels of mode {image.mode} are not supported: convert the image to L or RGB.")
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
    return image if isinstance(image, Tensor) else tvf.pil_to_tensor(image).contiguous()


def to_unit(pixels: UInt8[Tensor, "*shape"] | Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert 8 bits to float32 in [0, 1]; return floats as they are."""
    return pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels


def to_8_bits(image: UInt8[Tensor, "c hh ww"] | Float[Tensor, "c hh ww"]) -> Image.Image:
    """Convert a grey or colour tensor, uint8 or in [0, 1], to a Pillow image of mode L or RGB."""
    return tvf.to_pil_image(image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8))


def deep_to_unit(image: Image.Image, values: tuple[float, float] | None = None) -> Float[Tensor, "1 hh ww"]:
    """Scale a grey image of one of the `DEEP_MODES` to [0, 1]; what lies outside is clamped.

    In 16-bit modes 0 and 65535 become 0 and 1. An image of mode I (32 bits) or F (float) shares the values that do with
    its source (`ImageSource.value_range`); without a source, they are its own.
    """
    if image.mode not in UNBOUNDED_MODES:
        values = 0.0, 65535.0
    low, high = values or range_of([image])
    pixels = _deep_values(image)  # and then in place, since large images fill the memory
    pixels -= np.float32(low)
    pixels /= np.float32(high - low)
    return torch.from_numpy(np.clip(pixels, 0, 1, out=pixels))[None]


def range_of(images: Iterable[Image.Image]) -> tuple[float, float]:
    """The values that become 0 and 1 in images of one of the `UNBOUNDED_MODES`.

    They are 0 and the full scale of the usual files, 65535 for mode I and 1 for mode F, unless a value is larger or
    negative: then the largest or the smallest. So they change little with one pixel that is a little brighter.
    """
    low, high = 0.0, 0.0
    for image in images:
        pixels = _deep_values(image)
        low = min(low, float(pixels.min()))
        high = max(high, float(pixels.max()), 65535.0 if image.mode == "I" else 1.0)
    return low, high


def _deep_values(image: Image.Image) -> Float[np.ndarray, "hh ww"]:
    values = np.asarray(image).astype(np.float32)
    np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)
    return np.clip(values, -_LARGEST_VALUE, _LARGEST_VALUE, out=values)


def _convert_pillow(image: Image.Image, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise _mismatch(channels_of(image), channels)
    wanted = "L" if channels == 1 else "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.mode in ("La", "RGBa"):  # premultiplied, which Pillow only converts back to the ordinary modes
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            colours = image if image.mode == "RGBA" else image.convert("RGBA")
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
