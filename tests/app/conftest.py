import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DRIVER = Path(__file__).with_name("watched_server.py")
BUNDLED = "crate_mae_micro_monotone_cifar10"
STARTS_WITHIN = 400  # seconds, on a machine with much else to do


class Served:
    """A running server, in a process of its own whose every written file and connection is noted.

    Attributes:
        url: of the app.
        noted: a function of nothing: what it wrote and whom it called since the app was ready.
    """

    def __init__(self, url, log):
        self.url = url
        self._log = log
        self._before = len(log.read_bytes())

    def noted(self):
        return self._log.read_bytes()[self._before :].decode().splitlines()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install '.[app]'")
    folder = tmp_path_factory.mktemp("served")
    log, output = folder / "noted.txt", folder / "output.txt"
    log.touch()
    environment = {**os.environ, "NOTED": str(log), "TMPDIR": str(folder)}
    with output.open("w") as out:
        command = [sys.executable, DRIVER, "app", "--port", "0"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not (found := re.search(r"The app is at (\S+)", output.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        yield Served(found[1], log)
        assert process.poll() is None, output.read_text()
        assert "/crate_mae/app/" not in output.read_text()  # in no traceback; of refusals Gradio writes its own
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def models():
    from crate_mae.app.compute import open_models

    return open_models([BUNDLED])


@pytest.fixture
def photograph():
    """A colour picture with something in it, wider than high."""
    rows, columns = np.mgrid[0:47, 0:61]
    pixels = np.stack([rows * 5, columns * 4, 128 + 100 * np.sin(rows * columns / 90)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def as_file():
    """From a picture to the bytes of its file."""

    def write(image, form="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return write
