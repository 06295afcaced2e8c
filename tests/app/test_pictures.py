"""Uploaded pictures: invalid files are refused in one sentence, and no decompression bomb is decoded."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from crate_mae.app import pictures
from crate_mae.app.pictures import from_uri, read_upload, shrink, to_png, to_uri
from crate_mae.errors import UserError

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64"/></svg>'


def png_that_says(width, height, body=b""):
    """A PNG with a header of that size, and rows that are not there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("picture.png", b"\0" * 50_000_000)
    return buffer.getvalue()


def test_a_picture_is_scaled_turned_upright_and_stripped_of_metadata(as_file, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif[0x010F] = "a camera"
    image = read_upload(as_file(photograph, "JPEG", exif=exif), side=23)
    assert image.mode == "RGB"
    assert image.size == (23, 30)  # 61 x 47, turned
    assert not image.getexif()
    assert not image.info


@pytest.mark.parametrize("form", pictures.FORMATS)
def test_every_format_that_is_named_is_read(form, as_file, photograph):
    image = read_upload(as_file(photograph, form), side=32)
    assert image.size == (42, 32)
    assert np.asarray(image).std() > 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(mode, as_file, photograph):
    grey = photograph.convert("L")
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else photograph.convert(mode)
    image = read_upload(as_file(picture), side=64)
    assert (image.mode, image.size) == ("RGB", photograph.size)
    assert np.asarray(image).std() > 20


def test_the_first_frame_of_an_animated_upload_is_used(as_file):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    animation = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_upload(animation, side=16).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as a PNG"),
        (b"dear diary, this is no picture" * 9, "cannot be read as a PNG"),
        (SVG, "cannot be read as a PNG"),
        (zip_bomb(), "cannot be read as a PNG"),
        (b"%PDF-1.7 and so on", "cannot be read as a PNG"),
        (png_that_says(10_000, 10_000), "10,000 x 10,000 pixels"),
        (png_that_says(60_000, 60_000), "more pixels than"),
        (png_that_says(1, 1, b"\0\1\2\3"), "1 x 1 pixels"),
        (png_that_says(7, 3000), "7 x 3,000 pixels"),
        (png_that_says(64, 64, b"\0\1\2\3"), "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be read as"),
        (b"\0" * (pictures.MAX_BYTES + 1), "larger than 12 MB"),
    ],
)
def test_invalid_files_are_refused_in_one_sentence(content, words):
    with pytest.raises(UserError, match=words) as refusal:
        read_upload(content, side=32)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 160


def test_a_cut_off_file_is_refused(as_file, photograph):
    for form in ("PNG", "JPEG", "WEBP"):
        whole = as_file(photograph, form)
        with pytest.raises(UserError, match=r"damaged|cannot be read as a PNG"):
            read_upload(whole[: len(whole) * 2 // 3], side=32)


def test_a_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("it was decoded"))
    for size in ((5001, 5000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(UserError, match="pixels"):
            read_upload(png_that_says(*size), side=32)
    with pytest.raises(pytest.fail.Exception):  # and what is not too large would have been
        read_upload(png_that_says(5000, 5000), side=32)


def test_text_that_unpacks_to_gigabytes_is_refused():
    text = b"comment\0\0" + zlib.compress(b"a" * 80_000_000)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    harmless = png_that_says(16, 16, (b"\0" + b"\1\2\3" * 16) * 16)
    with pytest.raises(UserError, match="damaged"):
        read_upload(harmless[:33] + chunk + harmless[33:], side=16)
    assert read_upload(harmless, side=16).size == (16, 16)


def test_a_very_long_picture_is_cropped_before_it_is_scaled():
    image = Image.new("RGB", (4000, 10), "red")
    image.paste("blue", (1980, 0, 2020, 10))
    assert shrink(image, side=64).size == (40, 10)
    assert shrink(image, side=64).getcolors() == [(400, (0, 0, 255))]
    assert shrink(image, side=5).size == (20, 5)


def test_a_picture_is_unchanged_by_its_uri(photograph):
    assert np.array_equal(read_upload(from_uri(to_uri(to_png(photograph))), side=99), photograph)


@pytest.mark.parametrize("address", [None, 7, "", "http://elsewhere/a.png", "/etc/passwd", "file:///etc/passwd"])
def test_only_data_uris_are_read(address):
    with pytest.raises(UserError, match="There is no picture"):
        from_uri(address)


def test_a_uri_that_is_too_long_or_damaged_is_refused():
    with pytest.raises(UserError, match="larger than 12 MB"):
        from_uri("data:image/png;base64," + "A" * (pictures.MAX_BYTES * 4 // 3 + 9))
    with pytest.raises(UserError, match="arrived incomplete"):
        from_uri("data:image/png;base64,!!!!")
