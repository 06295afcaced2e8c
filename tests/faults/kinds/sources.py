"""Images, tar shards, parquet files and folders: damaged, odd, and hostile."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import tarfile
import tempfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from crate_mae.commands.data import check as check_command
from crate_mae.data import UnreadableImage, check, evaluation_transform, open_source
from crate_mae.data.decode import optional_formats
from crate_mae.data.resize import resize_images
from crate_mae.evaluation.backbones import RawPixels
from crate_mae.models.features import apply_to_images, encode
from tests.faults.fuzz import Kind

FORMS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *optional_formats())
_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "AVIF": ".avif",
    "HEIF": ".heic",
}
# What a header may say; some are not formats of the library.
_ODD_FORMS = ("EPS", "ICO", "PCX", "TGA", "SGI", "JPEG2000", "PDF", "DDS", "ICNS", "MPO", "SPIDER")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16")


def encoded(rng: random.Random, form: str, *, mode: str = "RGB", most: int = 40) -> bytes:
    """A file of random pixels."""
    size = (rng.randint(1, most), rng.randint(1, most))
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16") else image.convert(mode)
    with io.BytesIO() as buffer:
        image.save(buffer, form)
        return buffer.getvalue()


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, cut out, cut off, doubled, or overwritten with extreme numbers."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not changed:
            break
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(len(changed), 64))
        length = rng.randint(1, 64)
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0")
                )
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at : at + length] = rng.randbytes(length)
            case _:
                del changed[at:]
    return bytes(changed)


# Images.


def make_damaged_image(rng: random.Random, folder: Path) -> Path:
    form = rng.choice(FORMS)
    path = folder / f"x{_SUFFIXES[form]}"
    path.write_bytes(mutated(rng, encoded(rng, form)))
    return path


def make_odd_image(rng: random.Random, folder: Path) -> Path:
    """A whole file of a rare mode, format, size or orientation under a common name."""
    path = folder / rng.choice(("x.jpg", "x.png", "x.tif", "x.webp"))
    match rng.randrange(5):
        case 0:
            form, mode = rng.choice(("PNG", "TIFF")), rng.choice(_MODES)
            try:
                path.write_bytes(encoded(rng, form, mode=mode))
            except OSError:
                path.write_bytes(encoded(rng, form))
        case 1:
            try:
                path.write_bytes(encoded(rng, rng.choice(_ODD_FORMS)))
            except (OSError, KeyError, ValueError):
                path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        case 2:
            path.write_bytes(claiming(rng.choice((1, 100, 60_000, 2**31 - 1)), rng.choice((1, 60_000, 2**31 - 1))))
        case 3:
            size = (rng.choice((1, 3, 20_000)), rng.choice((1, 2)))
            with io.BytesIO() as buffer:
                Image.new(rng.choice(("L", "RGB", "I;16")), size[:: rng.choice((1, -1))]).save(buffer, "PNG")
                path.write_bytes(buffer.getvalue())
        case _:
            exif = Image.Exif()
            exif[274] = rng.choice((0, 1, 6, 8, 9, 65535, "x"))
            try:
                Image.new("RGB", (5, 9)).save(path, "JPEG", exif=exif)
            except (OSError, struct.error, ValueError, TypeError):
                path.write_bytes(b"")
    return path


def claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


# Tar shards.


def make_shard(rng: random.Random, folder: Path) -> Path:
    """A shard with odd members, then perhaps damaged."""
    path = folder / "x.tar"
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(path, "w", format=form) as shard:
        for number in range(rng.randint(1, 6)):
            for name, content in _members(rng, number):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if form == tarfile.PAX_FORMAT and rng.random() < 0.2:
                    info.pax_headers = rng.choice(_PAX)
                if rng.random() < 0.1:
                    info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
                    info.linkname = rng.choice(("0.png", "/dev/zero", "nowhere", ""))
                    info.size = 0
                with contextlib.suppress(ValueError):  # a name that this form of tar cannot have
                    shard.addfile(info, io.BytesIO(content) if info.isreg() else None)
    if rng.random() < 0.7:
        path.write_bytes(mutated_at_headers(rng, path.read_bytes()))
    return path


_PAX = (
    {"size": str(2**70)},
    {"size": "-1"},
    {"size": "x"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50), "GNU.sparse.name": "q.png"},
    {"GNU.sparse.map": "0,1,x", "GNU.sparse.size": "9"},
    {"path": "caf\udce9.png"},
    {"path": "\x1b[2J.png"},
    {"mtime": "9" * 400},
    {"hdrcharset": "BINARY"},
)


def _members(rng: random.Random, number: int) -> list[tuple[str, bytes]]:
    key = rng.choice((str(number), str(number), f"d/{number}", "same", "ü" * rng.randint(1, 200)))
    image = encoded(rng, "PNG", most=9)
    label: Any = rng.choice((0, 1, "cat", "9" * 30, "-1", "", "1_0", "²", "\ud800", "9" * 5000, "1.5"))
    labels = [
        (f"{key}.cls", str(label).encode("utf-8", "surrogatepass")),
        (f"{key}.json", json.dumps({rng.choice(("label", "cls", "x")): label}).encode()),
        (f"{key}.json", rng.choice((b"[" * 100_000, b"\xff\xfe", b"NaN", b"{", b'{"label": 1e999}', b"[1]", b""))),
    ]
    members = [(f"{key}.png", rng.choice((image, image, mutated(rng, image), b"")))]
    return members + rng.sample(labels, rng.randint(0, 2))


def mutated_at_headers(rng: random.Random, content: bytes) -> bytes:
    """Damage to the headers of members, some with a right checksum; or anywhere."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = 512 * rng.randrange(max(1, len(changed) // 512))
        field, size = rng.choice(((0, 100), (124, 12), (124, 12), (156, 1), (148, 8), (257, 8), (345, 155), (0, 512)))
        wrong = rng.choice(
            (rng.randbytes(size), b"7" * size, b"\xff" * size, b"\x80" + b"\xff" * (size - 1), b"SxgLK15")
        )
        changed[at + field : at + field + len(wrong[:size])] = wrong[:size]
        if rng.random() < 0.7 and len(changed) >= at + 512:
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % (sum(changed[at : at + 512]) % 8**6)
    if rng.random() < 0.3:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


# Parquet files.


def make_parquet(rng: random.Random, folder: Path) -> Path:
    """One or two files with odd columns and metadata, perhaps damaged."""
    for number in range(rng.choice((1, 1, 2))):
        path = folder / f"{number}.parquet"
        rows = rng.randint(1, 5)
        images = [rng.choice((encoded(rng, "PNG", most=9), b"", None, b"x" * 99)) for _ in range(rows)]
        if rng.random() < 0.6:
            images = [{"bytes": image, "path": None} for image in images]
        columns: dict[str, Any] = {rng.choice(("image", "img", "x")): images}
        if rng.random() < 0.8:
            columns[rng.choice(("label", "cls", "y"))] = _label_column(rng, rows)
        table = pa.table(columns)
        if rng.random() < 0.6:
            table = table.replace_schema_metadata({b"huggingface": _metadata(rng, table.column_names)})
        pq.write_table(table, path, row_group_size=rng.choice((1, 2, 100)))
        if rng.random() < 0.3:
            path.write_bytes(mutated(rng, path.read_bytes()))
    return folder


def _label_column(rng: random.Random, rows: int) -> Any:
    values: Any = [rng.choice((0, 1, 2)) for _ in range(rows)]
    match rng.randrange(9):
        case 0:
            return pa.array([2**64 - 1 - value for value in values], pa.uint64())
        case 1:
            return pa.array(["ba"[value % 2] for value in values]).dictionary_encode()
        case 2:
            return pa.array([str(value) for value in values])
        case 3:
            return pa.array([-value for value in values])
        case 4:
            return pa.array([float(value) for value in values])
        case 5:
            return pa.array([[value] for value in values])
        case 6:
            return pa.array([rng.choice((None, value)) for value in values], pa.int64())
        case 7:
            return pa.array(values, pa.uint64())
        case _:
            return pa.array(values)


def _metadata(rng: random.Random, names: list[str]) -> bytes:
    odd: tuple[Any, ...] = (
        None,
        1,
        "x",
        [],
        {},
        [1],
        ["a"],
        ["a", "a"],
        ["a", 1],
        ["a", "b", "c"],
        {"0": "a"},
        "\ud800",
    )
    features: Any = {
        name: rng.choice(
            (
                {"_type": "Image"},
                {"_type": "ClassLabel", "names": rng.choice(odd)},
                {"_type": rng.choice(odd)},
                rng.choice(odd),
            )
        )
        for name in names
    }
    info = rng.choice(({"features": features}, {"features": features}, {"features": rng.choice(odd)}, rng.choice(odd)))
    content = json.dumps({"info": info}).encode()
    return rng.choice((content, content, content, b"[" * 100_000, b"\xff", b"1" * 5000, b"null"))


# Folders.


def make_folder(rng: random.Random, folder: Path) -> Path:
    """Images of several classes beside pipes, links, devices, sparse files, deep folders, and names of any bytes."""
    for number in range(rng.randint(0, 5)):
        below = folder / rng.choice(("a", "b", "train", "@eaDir", "lost+found", "$RECYCLE.BIN", "__MACOSX", "."))
        below.mkdir(exist_ok=True)
        (below / f"{number}.png").write_bytes(encoded(rng, "PNG", most=9))
    for number in range(rng.randint(1, 3)):
        path = folder / rng.choice(("a.png", "b.jpg", "c.jfif", "d.avif", "e.parquet", "f.tar", "g"))
        path = path.with_stem(path.stem + str(number))
        match rng.randrange(9):
            case 0:
                os.mkfifo(path)
            case 1:
                path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/stdin", "nowhere", ".", path.name)))
            case 2:
                path.touch()
                os.truncate(path, rng.choice((1, 2**20, 30 * 2**30)))
            case 3:
                path.mkdir()
            case 4:
                _deep(folder, rng.choice((10, 10, 10, 300, 1200)))
            case 5:
                name = rng.randbytes(rng.randint(1, 9)).replace(b"/", b"x").replace(b"\0", b"x")
                with open(os.fsencode(folder) + b"/" + name + b".png", "wb") as file:  # noqa: PTH123
                    file.write(encoded(rng, "PNG", most=9))
            case 6:
                (folder / "\x1b]0;x\x07\n.png").write_bytes(b"x")
            case 7:
                path.write_bytes(rng.randbytes(rng.randint(0, 2000)))
            case _:
                path.touch(mode=0)
    return folder


def _deep(folder: Path, depth: int) -> None:
    """Nested folders, made one by one, since their path is longer than a call may take."""
    above = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        with contextlib.suppress(FileExistsError):
            os.mkdir("ddd", dir_fd=above)
        below = os.open("ddd", os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)


# Data sets of Python.


def make_items(rng: random.Random, _folder: Path) -> list[Any]:
    """Items as users give them: arrays and pictures of every type, pairs, dictionaries, and what is none of these."""
    draw = np.random.default_rng(rng.getrandbits(32))
    items = []
    for _ in range(rng.randint(1, 4)):
        shape = tuple(rng.choice((0, 1, 3, 8)) for _ in range(rng.choice((0, 1, 2, 3, 3, 4))))
        kinds = ("u1", "u1", "<u2", ">u2", "i4", "f2", "f4", ">f8", "?", "O", "c8", "g", "M8[s]")
        array = draw.integers(0, rng.choice((2, 2, 256)), shape).astype("u1").astype(rng.choice(kinds))
        mode = rng.choice((*_MODES, "La", "RGBa", "PA", "HSV", "YCbCr", "LAB", "I;16B"))
        picture = Image.new(mode, (rng.choice((0, 1, 9)), rng.choice((1, 9))))
        opened: Any = picture
        with contextlib.suppress(Exception):
            opened = Image.open(io.BytesIO(mutated(rng, encoded(rng, rng.choice(FORMS)))))
        image = rng.choice((array, array, picture, opened, encoded(rng, "PNG"), b"", None, "x.png", 5, {}, ()))
        label = rng.choice((0, 1, "a", 2**64, -1, None, 0.5, np.uint64(2**64 - 1), np.array(3), [1], "\ud800"))
        items.append(rng.choice((image, (image, label), {"image": image, "label": label}, [image, label])))
    return items


# Calls.


def read_all(data: Any) -> None:
    """Every image of a source, prepared for a model, with its label."""
    source = open_source(data)
    transform = evaluation_transform((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
    _ = source.fingerprint(), source.labels
    for i in range(min(len(source), 20)):
        try:
            transform(source.read(i))
        except UnreadableImage as error:
            assert str(error)


def check_all(data: Any) -> None:
    """The command `data check`."""
    check_command(data)


def report_all(data: Any) -> None:
    """The check behind that command."""
    check(open_source(data))


def copy_all(data: Any) -> None:
    """The copy behind the command `data resize`."""
    with tempfile.TemporaryDirectory() as folder:
        resize_images(open_source(data), Path(folder) / "copy", 5, workers=0, max_bad=1.0)


def embed_items(items: Any) -> None:
    """The items, or the images at a path, as `embed` of a model takes them."""
    encoder = RawPixels()
    encoder.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))  # tells the device
    transform = evaluation_transform((4, 4), 3, (0.5,) * 3, (0.5,) * 3)
    apply_to_images(partial(encode, encoder, pooling="mean"), encoder, transform, items, 64)


KINDS = [
    Kind("damaged image", make_damaged_image, (embed_items, read_all)),
    Kind("odd image", make_odd_image, (embed_items, check_all, copy_all)),
    Kind("Python items", make_items, (read_all, report_all, copy_all)),
    Kind("tar shard", make_shard, (read_all, check_all, copy_all)),
    Kind("parquet files", make_parquet, (read_all, check_all, copy_all)),
    Kind("folder", make_folder, (read_all, check_all, copy_all)),
]
