"""Shapes are checked at run time in every test, and the shared test data is optional."""

import contextlib
import functools
import gc
import importlib
import inspect
import os
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
# Folders of long tests, which start first: otherwise one process would be left alone with them at the end.
LONGEST = (
    "docs",
    "training",
    "comparison",
    "interpret",
    "costs",
    "benchmarks",
    "commands",
    "app",
    "deployment",
    "models",
)

if IS_ONE_OF_SEVERAL:
    # Several processes test at once: with a thread a core in each, they would spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

# While a module of ours is imported, the hook gives the bytecode of everything that this imports another name. So the
# large libraries are imported before: otherwise every process would compile them anew and not read their bytecode.
gc.disable()
for library in ("beartype", "accelerate", "matplotlib.pyplot", "scipy.signal", "timm", "torchmetrics", "transformers"):
    importlib.import_module(library)
gc.enable()
gc.freeze()  # what they leave is no garbage, and need not be looked through again and again


def jaxtyped_if_it_names_shapes(decorated=None, /, *, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """`jaxtyping.jaxtyped`, but for functions without shapes: the type checker sees their types without running them.

    With all functions checked, tests would take half as long again. For the same reason only the first `MOST_CHECKS`
    calls of a function are checked in each test: a loop calls it with the same shapes again and again.
    """
    if decorated is None:
        return partial(jaxtyped_if_it_names_shapes, typechecker=typechecker)
    if not inspect.isfunction(decorated):
        return jaxtyped(decorated, typechecker=typechecker)
    if not names_shapes(decorated):
        return decorated
    checked = jaxtyped(decorated, typechecker=typechecker)

    @functools.wraps(checked)
    def at_first(*args, **kwargs):
        if CHECKS[decorated] == MOST_CHECKS:
            return decorated(*args, **kwargs)
        CHECKS[decorated] += 1
        return checked(*args, **kwargs)

    return at_first


def names_shapes(function) -> bool:
    annotations = list(function.__annotations__.values())
    for i, annotation in enumerate(annotations):
        if isinstance(annotation, str):
            with contextlib.suppress(NameError):  # a name that is imported for the type checker alone
                annotations[i] = eval(annotation, function.__globals__)
    return any(words in repr(annotations) for words in ("jaxtyping", "[Tensor", "[np.ndarray"))


MOST_CHECKS = 20
CHECKS: Counter[object] = Counter()  # by function, in the test that runs
jaxtyping.jaxtyped = jaxtyped_if_it_names_shapes
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


@pytest.fixture(autouse=True)
def shapes_are_checked_again():
    """Every test begins to count anew."""
    CHECKS.clear()


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    """Where every test has a folder: pytest's own way to make one looks at all that there are."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_cache(caches, monkeypatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = Path(tempfile.mkdtemp(dir=caches))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def class_folder(tmp_path):
    """`class_folder("name", {"red": 3, ...})`: a folder of classes of so many images, of one main colour a class."""

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


@pytest.fixture(scope="module")  # while it is open, an event loop runs, with which no other test could start its own
def chromium():
    """A browser, driven by playwright."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    reason = "the browser is driven by playwright: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Log and output of a test with names that are no text can be sent between pytest's processes."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
