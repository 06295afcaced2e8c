"""What the README shows works: its Python runs, its commands are understood, its files are there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (crate-mae .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 4
    assert len(CODE) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    build_app().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("code", CODE)
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("FOLDER").mkdir()
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(f"FOLDER/{i}.png")
    monkeypatch.setattr("crate_mae.training.options.PretrainOptions.usual_epochs", 2)
    namespace = {"images": torch.randn(2, 3, 8, 8)}
    exec(code.replace('"crate_mae_base_patch16_224"', '"crate_mae_nano_patch2_8"'), namespace)
    assert namespace["output"].prediction.shape == (2, 16, 12)
    assert namespace["features"].shape == (2, 17, 96)


def test_pictures_and_files_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(
        r"\]\(((?:docs|results|benchmarks)/.*?)\)", README
    ):
        assert (ROOT / path).is_file(), path
