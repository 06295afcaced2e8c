"""Shapes are checked at run time in every test, and the shared test data is optional."""

import importlib
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
# Folders of long tests, which start first: otherwise one process would be left alone with them at the end.
LONGEST = ("training", "docs", "comparison", "interpret", "costs", "benchmarks", "commands", "app")

if IS_ONE_OF_SEVERAL:
    # Several processes test at once: with a thread a core in each, they would spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

# While a module of ours is imported, the hook gives the bytecode of everything that this imports another name. So the
# large libraries are imported before: otherwise every process would compile them anew and not read their bytecode.
for library in ("beartype", "accelerate", "matplotlib.pyplot", "scipy.signal", "timm", "torchmetrics", "transformers"):
    importlib.import_module(library)

install_import_hook("crate_mae", "beartype.beartype")


def pytest_collection_modifyitems(items):
    if IS_ONE_OF_SEVERAL:
        places = {folder: place for place, folder in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that stands beside the project on the developers' machines."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder with real data and golden vectors is not beside the project")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Log and output of a test with names that are no text can be sent between pytest's processes."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
