"""Small generated images, each of one known colour, so that a test can tell them apart."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """`encoded(level)`: a file of one grey level, colour by default."""

    def encode(level: int, *, form: str = "PNG", size: tuple[int, int] = (7, 5), mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, (level,) * 3 if mode == "RGB" else level).save(buffer, format=form)
        return buffer.getvalue()

    return encode


@pytest.fixture
def noisy() -> Callable[..., bytes]:
    """`noisy(seed)`: a file with random pixels, long enough to be cut."""

    def encode(seed: int, *, form: str = "JPEG", size: tuple[int, int] = (61, 53), **options) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=form, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def level_of() -> Callable[..., int]:
    """Grey level of the first pixel of image i of a source."""

    def read(source, i: int) -> int:
        return int(np.asarray(source.read(i)).reshape(-1)[0])

    return read


@pytest.fixture
def make_folder(tmp_path, encoded) -> Callable[..., Path]:
    """`make_folder({"a/b.png": 10})`: a folder with images of these grey levels."""

    def make(levels: dict[str, int], name: str = "images") -> Path:
        for relative, level in levels.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(level))
        return tmp_path / name

    return make
