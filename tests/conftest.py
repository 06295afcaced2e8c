"""Shapes are checked at run time in every test, and the shared test data is optional."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes test at once: with a thread a core in each, they would spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

install_import_hook("crate_mae", "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that stands beside the project on the developers' machines."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder with real data and golden vectors is not beside the project")
    return folder
