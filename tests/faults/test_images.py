"""Damaged, hostile and odd images: each is read right, or is unreadable with a reason."""

import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from crate_mae.data import UnreadableImage, evaluation_transform, finetune_transform, open_source, to_channels
from crate_mae.data import decode as decode_module
from crate_mae.data.decode import decode, upright
from crate_mae.errors import UserError
from tests.faults.kinds.sources import claiming


def saved(image, form="PNG", **options):
    with io.BytesIO() as buffer:
        image.save(buffer, form, **options)
        return buffer.getvalue()


def gradient(width=64, height=48):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x % 256, 5 * y % 256, x * y % 256], -1).astype(np.uint8))


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "PDF", "DDS", "SGI"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_other_formats_are_not_even_opened(tmp_path, form, suffix, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was run"))
    (tmp_path / f"x{suffix}").write_bytes(saved(gradient(), form))
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        open_source(tmp_path).read(0)


def test_an_open_picture_of_another_format_is_refused_unless_it_was_converted(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was run"))
    with pytest.raises(UnreadableImage, match=r"the format EPS is not one of JPEG, PNG"):
        open_source([Image.open(io.BytesIO(saved(gradient(), "EPS")))]).read(0)
    assert open_source([Image.open(io.BytesIO(saved(gradient(), "TGA"))).convert("RGB")]).read(0).size == (64, 48)


def test_truncated_images_stay_unreadable_where_others_let_them_in(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for form in ("JPEG", "PNG"):
        content = saved(gradient(), form)[:-200]
        with pytest.raises(UnreadableImage):
            decode(content, "x")
        with pytest.raises(UnreadableImage):
            upright(Image.open(io.BytesIO(content)), "x")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_every_flipped_bit_of_a_png_files_pixels_is_noticed():
    whole = saved(gradient(16, 12))
    first = whole.index(b"IDAT") + 4
    for at in range(first, len(whole) - 12):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        with pytest.raises(UnreadableImage, match=r"checksum|broken|CRC|damaged"):
            decode(bytes(content), "x")


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "GIF", "WEBP"])
def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch, form):
    monkeypatch.setattr(decode_module, "MOST_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"64 x 48 pixels are more than the 1,000 that are read"):
        decode(saved(gradient(), form), "x")
    assert upright(gradient(), "x").size == (64, 48)  # it is in the memory already


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch):
    monkeypatch.setattr(decode_module, "MOST_PIXELS", 1000)
    image = decode(saved(gradient(), "JPEG", quality=95), "x")
    assert image.size == (32, 24)
    exact = np.asarray(gradient().reduce(2), dtype=np.float32)
    assert np.abs(np.asarray(image, dtype=np.float32) - exact)[..., :2].mean() < 8


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (60_000, 2_000)])
def test_a_header_that_claims_many_pixels_takes_no_memory(size):
    tracemalloc.start()
    with pytest.raises(UnreadableImage):
        decode(claiming(*size), "x")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("thin", [(4000, 1), (1, 4000), (4001, 3)])
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_thin_image_is_cropped_before_it_is_enlarged(monkeypatch, thin, mode):
    width, height = thin
    ramp = np.linspace(0, 1, max(thin))
    ramp = np.tile(ramp, (height, 1)) if width > height else np.tile(ramp[:, None], (1, width))
    scale, kind = (255, np.uint8) if mode == "RGB" else (65535, np.uint16)
    image = Image.fromarray((ramp * scale).round().astype(kind))
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: largest.append(size) or resize(self, size, *a, **k)
    )
    result = evaluation_transform((32, 32), 1, (0.0,), (1.0,))(image if mode == "I;16" else image.convert("RGB"))
    assert all(w * h <= 20 * 32 * 32 for w, h in largest)
    assert result.mean().item() == pytest.approx(0.5, abs=0.01)  # the middle of the ramp


def test_images_that_are_not_thin_are_prepared_as_before():
    image = gradient(320, 20)
    result = evaluation_transform((10, 10), 3, (0.0,) * 3, (1.0,) * 3)(image)
    whole = image.resize((160, 10), Image.Resampling.BICUBIC).crop((75, 0, 85, 10))
    assert torch.equal((result * 255).round().byte(), torch.from_numpy(np.array(whole)).permute(2, 0, 1))


@pytest.mark.parametrize("policy", ["", "rand-m0-n1"])
def test_sixteen_bits_and_eight_bits_of_one_picture_agree(policy):
    edge = np.zeros((32, 32), np.uint16)
    edge[:, 16:] = 65535
    transform = finetune_transform((64, 64), 1, (0.0,), (1.0,), min_crop=1.0, flip=False, rand_augment=policy)
    for seed in range(20):
        pair = []
        for pixels in (edge, (edge >> 8).astype(np.uint8)):
            torch.manual_seed(seed)
            pair.append(transform(Image.fromarray(pixels)))
        assert (pair[0] - pair[1]).abs().max() < 0.02


@pytest.mark.parametrize("mean", [(123.7, 116.3, 103.5), (0.5, 0.5, -0.1), (0.5, 0.5, float("nan"))])
def test_a_mean_outside_of_the_unit_range_is_refused(mean):
    with pytest.raises(UserError, match=r"not those of pixels in \[0, 1\]"):
        evaluation_transform((8, 8), 3, mean, (0.2,) * 3)
    with pytest.raises(UserError, match="Divide by 255"):
        evaluation_transform((8, 8), 3, (0.5,) * 3, (58.4, 57.1, 57.4))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_path_and_an_open_picture_are_the_same_image(tmp_path, orientation, form):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x.{form.lower()}"
    path.write_bytes(saved(gradient(), form, exif=exif))
    from_path = open_source(path).read(0)
    opened = Image.open(path)
    forms = [opened, (opened, 1), {"image": opened}, Image.open(path).convert("RGB"), path.read_bytes()]
    for item in forms:
        assert np.array_equal(
            np.asarray(open_source([item]).read(0).convert("RGB")), np.asarray(from_path.convert("RGB"))
        )


def test_of_pictures_with_several_frames_the_open_one_is_read(tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        path = tmp_path / f"x.{form.lower()}"
        frames[0].save(
            path, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        with Image.open(path) as picture:
            levels = [
                to_channels(open_source([data]).read(0), 1).getpixel((0, 0)) for data in (picture, path.read_bytes())
            ]
        assert levels == [10, 10]


@pytest.mark.parametrize(
    "mode", ["La", "RGBa", "LA", "RGBA", "PA", "1", "P", "HSV", "YCbCr", "CMYK", "I", "F", "I;16", "RGBX"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_supported_mode_are_prepared(mode, channels):
    image = Image.new("L", (5, 3), 100)
    image = image.convert(
        {"La": "LA", "RGBa": "RGBA"}.get(
            mode, "RGB" if mode in ("HSV", "YCbCr", "CMYK", "RGBX") else mode if mode not in ("PA", "P") else "L"
        )
    )
    image = image.convert(mode)
    result = evaluation_transform((4, 4), channels, (0.5,) * channels, (0.5,) * channels)(open_source([image]).read(0))
    assert result.shape == (channels, 4, 4)
    assert torch.isfinite(result).all()


def test_a_picture_of_another_mode_is_a_sentence():
    with pytest.raises(UnreadableImage, match="mode LAB"):
        open_source([Image.new("LAB", (4, 4))]).read(0)
    with pytest.raises(UserError, match="mode LAB"):
        evaluation_transform((4, 4), 3, (0.5,) * 3, (0.5,) * 3)(Image.new("LAB", (4, 4)))


def test_what_is_not_a_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").touch()
    os.truncate(tmp_path / "c.png", 2**40)
    (tmp_path / "d.png").symlink_to("d.png")
    source = open_source(tmp_path)
    reasons = []
    for i in range(len(source)):
        with pytest.raises(UnreadableImage) as error:
            source.read(i)
        reasons.append(error.value.reason)
    assert all("not a regular file" in reason for reason in reasons[:2])
    assert "more than the 536,870,912" in reasons[2]
    assert len(reasons) == 4


def test_a_single_pipe_is_named(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is a pipe, a socket or a device"):
        open_source(tmp_path / "a.png")


def test_a_png_with_a_damaged_length_does_not_loop():
    whole = bytearray(saved(gradient()))
    at = whole.index(b"IDAT") - 4
    for length in (0, 2**31, 2**32 - 1):
        whole[at : at + 4] = struct.pack(">I", length)
        with pytest.raises(UnreadableImage):
            decode(bytes(whole), "x")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5), np.uint8), "no pixels"),
        (np.zeros((3, 3), object), "the type object"),
        (np.zeros((3, 3), np.complex64), "the type complex64"),
        (np.zeros((3, 3), np.longdouble), "the type float128|the type longdouble"),
        (np.zeros((3, 3), np.int32), "the type torch.int32"),
        (np.full((3, 3), np.nan), "a float image is in"),
        (np.zeros(3, np.uint8), "has the shape"),
    ],
)
def test_arrays_that_are_no_images_are_sentences(array, message):
    with pytest.raises(UserError, match=message):
        open_source([array]).read(0)


def test_arrays_of_another_byte_order_are_read():
    for kind, level in ((">u2", 13107), (">f4", 0.2), (">f8", 0.2)):
        assert open_source([np.full((3, 3), level, kind)]).read(0).flatten()[0].item() == pytest.approx(0.2)


def test_a_picture_without_pixels_is_unreadable():
    with pytest.raises(UnreadableImage, match="no pixels"):
        open_source([Image.new("L", (0, 4))]).read(0)
