import numpy as np
import pytest
from PIL import Image

from crate_mae.cli import main


@pytest.fixture
def crate_mae_command(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*tokens):
        code = 0
        try:
            main([str(token) for token in tokens])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def photos(tmp_path):
    """A folder of three pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (11, 13, 3), dtype=np.uint8)).save(folder / f"photo {i} ü.png")
    return folder
