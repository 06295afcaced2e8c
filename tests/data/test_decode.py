import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import UnreadableImage, open_source, to_channels, to_tensor
from crate_mae.data import decode as decode_module
from crate_mae.data.decode import channels_of, decode
from crate_mae.errors import UserError


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def unit_pixel(content, channels, at=(0, 0)):
    """Pixel (row, column) in [0, 1] after decoding and conversion."""
    pixels = to_tensor(to_channels(decode(content, "x"), channels))
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return pixels[:, at[0], at[1]].tolist()


def test_empty_and_foreign_files_are_unreadable():
    with pytest.raises(UnreadableImage, match=r"a\.png: the file is empty \(0 bytes\)"):
        decode(b"", "a.png")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        decode(b"%PDF-1.4 something else", "a.png")


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_are_unreadable(noisy, form, options, share):
    content = noisy(1, form=form, **options)
    assert decode(content, "x").size == (61, 53)
    with pytest.raises(UnreadableImage) as error:
        decode(content[: int(len(content) * share)], "x")
    assert 0 < len(error.value.reason) <= 160


def has(form):
    return pytest.mark.skipif(form not in decode_module.optional_formats(), reason=f"{form} is not read here")


@pytest.mark.parametrize("form", [pytest.param("AVIF", marks=has("AVIF")), pytest.param("HEIF", marks=has("HEIF"))])
def test_optional_formats_are_read_where_they_can_be(noisy, form):
    content = noisy(1, form=form)
    image = decode(content, "x")
    assert (image.size, image.mode, image.format) == ((61, 53), "RGB", form)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(UnreadableImage):
            decode(content[: int(len(content) * share)], "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(99), r"format HEIF, which is not read here: pip install pillow-heif"),
        (b"\0\0\0\x18ftypavif" + bytes(99), "format AVIF, which is not read here: pip install --upgrade pillow"),
        (b"\xff\x0a" + bytes(99), "format JPEG XL, which is not read: convert it"),
        (b"\0\0\0\x18ftypqt  " + bytes(99), "not an image of a known format"),
    ],
)
def test_formats_that_are_not_read_are_named_whatever_the_name_of_the_file(content, reason, monkeypatch):
    monkeypatch.setattr(decode_module, "optional_formats", lambda: ())
    with pytest.raises(UnreadableImage, match=reason):
        decode(content, "IMG_0001.jpg")


def test_without_its_plug_in_heif_is_no_format(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # so that importing it fails
    assert "HEIF" not in decode_module.optional_formats.__wrapped__()


def test_a_flipped_byte_in_a_png_is_noticed(noisy):
    content = bytearray(noisy(1, form="PNG"))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(UnreadableImage):
        decode(bytes(content), "x")


def test_a_decompression_bomb_is_refused_without_decoding():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "x")


def test_a_large_but_honest_image_is_read_without_a_warning(monkeypatch, encoded):
    content = encoded(5, size=(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(content, "x").size == (40, 30)


def test_a_format_error_of_any_type_is_unreadable(encoded, monkeypatch):
    def fail(self):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(UnreadableImage, match="unpack requires"):
        decode(encoded(1), "x")


def test_missing_and_forbidden_files_are_unreadable(make_folder, monkeypatch):
    root = make_folder({"a.png": 1, "b.png": 2})
    source = open_source(root)
    (root / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(0)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UnreadableImage, match=r"b\.png: permission denied"):
        source.read(1)


def test_a_file_without_read_permission_is_unreadable(make_folder):
    root = make_folder({"a.png": 1})
    (root / "a.png").chmod(0)
    if os.access(root / "a.png", os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(UnreadableImage, match="permission denied"):
        open_source(root).read(0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(form):
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:, :16] = 255  # white at the left
    exif = Image.Exif()
    exif[274] = 6  # to be shown rotated by 90 degrees clockwise: white at the top
    image = decode(saved(Image.fromarray(pixels).convert("RGB"), form, exif=exif), "x")
    assert image.size == (16, 32)
    upright = np.asarray(image.convert("L"))
    assert upright[4].mean() > 250
    assert upright[-4].mean() < 5
    assert image.format == form


def test_sixteen_bits_keep_their_precision():
    content = saved(Image.fromarray(np.array([[0, 1, 32768, 65535]], dtype=np.uint16)))
    values = [unit_pixel(content, 1, (0, column))[0] for column in range(4)]
    assert values == pytest.approx([0, 1 / 65535, 32768 / 65535, 1], abs=1e-8)
    assert unit_pixel(content, 3, (0, 2)) == pytest.approx([32768 / 65535] * 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_both_byte_orders_of_sixteen_bits_agree(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (2, 1), np.array([256, 65535], dtype=order).tobytes())
    assert to_channels(image, 1).flatten().tolist() == pytest.approx([256 / 65535, 1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 40000]], dtype=np.int32), [0, 40000 / 65535]),
        (np.array([[2**29, 2**30]], dtype=np.int32), [0.5, 1]),
        (np.array([[-(2**20), 2**20]], dtype=np.int32), [0, 1]),
        (np.array([[0, 0.25]], dtype=np.float32), [0, 0.25]),
        (np.array([[51, 255]], dtype=np.float32), [0.2, 1]),
        (np.array([[-1000, 1000, np.nan]], dtype=np.float32), [0, 1, 0.5]),
        (np.array([[1e38, np.inf]], dtype=np.float32), [1, 0]),
    ],
)
def test_deep_modes_are_scaled_by_their_range(values, expected):
    image = decode(saved(Image.fromarray(values), "TIFF"), "x")
    assert to_channels(image, 1).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_little_brighter_pixel_changes_the_scale_a_little():
    for level, brighter in ((0.5, 1.0001), (65000, 65600)):
        kind = np.float32 if level < 1 else np.int32
        plain = np.full((3, 3), level, kind)
        other = plain.copy()
        other[0, 0] = brighter
        means = [float(to_channels(Image.fromarray(pixels), 1)[0, 1, 1]) for pixels in (plain, other)]
        assert means[1] == pytest.approx(means[0], rel=0.01)


def test_images_of_one_source_share_their_range(tmp_path):
    for name, top in (("a", 400.0), ("b", 100.0), ("c", 200.0)):
        Image.fromarray(np.array([[0, top]], dtype=np.float32)).save(tmp_path / f"{name}.tif")
    source = open_source(tmp_path)
    assert [source.read(i).max().item() for i in range(3)] == [1, 0.25, 0.5]
    assert source.value_range("F") == (0, 400)
    assert open_source([source.picture(0), source.picture(1)]).read(1).max().item() == 0.25


def test_a_sixteen_bit_pgm_is_scaled_by_65535():
    content = b"P5 2 1 65535 " + np.array([256, 65535], dtype=">u2").tobytes()
    assert [unit_pixel(content, 1, (0, column))[0] for column in range(2)] == pytest.approx([256 / 65535, 1], abs=1e-6)


def test_one_bit_and_grey_images_become_colour():
    assert unit_pixel(saved(Image.new("1", (3, 2), 1)), 3) == [1, 1, 1]
    assert unit_pixel(saved(Image.new("L", (3, 2), 51)), 3) == pytest.approx([0.2] * 3)
    assert unit_pixel(saved(Image.new("1", (3, 2), 1)), 1) == [1]


def test_colour_becomes_grey_by_its_luma():
    assert unit_pixel(saved(Image.new("RGB", (3, 2), (255, 0, 0))), 1) == pytest.approx([0.299], abs=0.003)


def test_transparent_parts_become_white():
    half = saved(Image.new("RGBA", (3, 2), (255, 0, 0, 128)))
    assert unit_pixel(half, 3) == pytest.approx([1, 0.498, 0.498], abs=0.005)
    assert unit_pixel(saved(Image.new("LA", (3, 2), (0, 0))), 1) == [1]
    assert unit_pixel(saved(Image.new("LA", (3, 2), (51, 255))), 3) == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"], ids=["opaque", "index", "bytes"])
def test_palettes_become_their_colours(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    content = saved(image, **({} if transparency is None else {"transparency": transparency}))
    assert decode(content, "x").mode == "P"
    assert unit_pixel(content, 3, (0, 0)) == [1, 0, 0]
    assert unit_pixel(content, 3, (0, 1)) == ([0, 0, 1] if transparency is None else [1, 1, 1])


def test_cmyk_becomes_colour_and_grey():
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF")
    assert unit_pixel(content, 3) == [1, 0, 0]
    assert unit_pixel(content, 1) == pytest.approx([0.299], abs=0.003)
    jpeg = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert decode(jpeg, "x").mode == "CMYK"
    assert unit_pixel(jpeg, 3) == pytest.approx([1, 0, 0], abs=0.03)


def test_an_unsupported_mode_is_unreadable():
    with pytest.raises(UnreadableImage, match="pixels of mode LAB are not supported"):
        decode(saved(Image.new("LAB", (2, 2)), "TIFF"), "x")


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert unit_pixel(content, 1) == pytest.approx([10 / 255])


def test_tensors_pass_with_their_own_channels_and_mismatches_name_both_counts():
    five = torch.rand(5, 3, 2)
    assert to_channels(five, 5) is five
    assert to_channels(torch.rand(1, 3, 2), 3).shape == (3, 3, 2)
    assert to_channels(torch.rand(3, 3, 2), 1).shape == (1, 3, 2)
    with pytest.raises(UserError, match=r"have 5 channel\(s\), but 3 are required"):
        to_channels(five, 3)
    with pytest.raises(UserError, match=r"have 3 channel\(s\), but 4 are required"):
        to_channels(Image.new("RGB", (2, 2)), 4)


def test_channels_are_counted_by_content():
    assert [channels_of(Image.new(mode, (1, 1))) for mode in ("1", "L", "LA", "I;16", "RGB", "P", "CMYK")] == [
        1,
        1,
        1,
        1,
        3,
        3,
        3,
    ]
    assert channels_of(torch.zeros(7, 2, 2)) == 7
