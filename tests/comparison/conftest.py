"""One real comparison on scikit-learn's digits, shared by the tests."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import crate_mae
from crate_mae.evaluation.probes import linear_probe
from crate_mae.training.report import RunReport

MODELS = ("crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8")
MEMORY = 7 * 2**20  # bytes of a step, instead of a process for each model
OPTIONS = {
    "budget": "steps=10",
    "batch_size": 25,
    "lr_search": 2,
    "search_share": 0.4,
    "seeds": 2,
    "precision": "float32",
    "workers": 0,
    "threads": 1,
    "min_crop": 0.6,
    "flip": False,
    "quiet": True,
}


def _set_environment(patch, cache):
    """Use the CPU, and a separate cache; runs write no reports, which take a third of their time.

    A linear probe tries 15 strengths of its penalty, one after another: here, two.
    """
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(RunReport, "_write", lambda _report: None)
    patch.setattr("crate_mae.comparison.results.linear_probe", partial(linear_probe, grid=(1e-3, 1e-1)))
    if torch.accelerator.is_available():
        patch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    _set_environment(monkeypatch, tmp_path_factory.mktemp("cache"))
    return os.environ


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Few of the digits, so that probes are quick, as folders of classes: options `train` and `val`."""
    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for part, chosen in (("train", range(260)), ("val", range(1500, 1590))):
        for i in chosen:
            file = folder / part / str(found.target[i]) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((found.images[i] * 15.9).astype(np.uint8)).save(file)
    return {part: str(folder / part) for part in ("train", "val")}


@pytest.fixture(scope="session")
def compared(tmp_path_factory, digits):
    """A finished comparison; tests that change it make a copy."""
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch, tmp_path_factory.mktemp("cache"))
        patch.setattr("crate_mae.comparison.entries.step_memory", lambda *_: MEMORY)  # measured in tests/costs
        return crate_mae.compare(MODELS, out=tmp_path_factory.mktemp("comparison") / "out", **OPTIONS, **digits)


@pytest.fixture
def compare(monkeypatch, digits):
    """`compare(out, *models, **options)`: with the options of `compared`, replaced by those given.

    Memory is not measured, because that starts a process for each model.
    """
    monkeypatch.setattr("crate_mae.comparison.entries.step_memory", lambda *_: None)

    def run(out, *models, **options):
        return crate_mae.compare(models or MODELS, out=out, **{**OPTIONS, **digits, **options})

    return run
