"""A cache of the tests' own, and small labelled images that tell their class by their colour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def class_folder(tmp_path):
    """`class_folder("name", {"red": 3, ...})`: a folder of classes with so many images of 9 x 8 pixels each."""

    def make(name, counts, seed=0):
        rng = np.random.default_rng(seed)
        for label, (kind, count) in enumerate(counts.items()):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (9, 8, 3), dtype=np.uint8)
                pixels[..., label % 3] += 140
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make
