"""Every tutorial does what it says: its Python and its commands run, in order, and print what the page shows."""

from pathlib import Path

import pytest

from docs.tools.blocks import DOCS, TUTORIALS, tutorial
from tests.docs.runner import run_page

# Those that continue with the folder and the run of the first tutorial, which is run once for all of them.
FIRST, *OTHERS = TUTORIALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the first tutorial has been followed."""
    path = tmp_path_factory.mktemp("tutorials")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run_page(tutorial(FIRST))
    return path


def test_first_tutorial(folder):
    assert (folder / "runs/mine/model.safetensors").is_file()
    assert (folder / "completed.png").is_file()


@pytest.mark.parametrize("name", OTHERS)
def test_tutorial(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_page(tutorial(name))


@pytest.mark.parametrize("name", ["install", "quickstart", "derivation"])
def test_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / f"{name}.md")


def test_every_tutorial_is_run():
    assert {path.stem for path in (DOCS / "tutorials").glob("*.md")} == set(TUTORIALS)
