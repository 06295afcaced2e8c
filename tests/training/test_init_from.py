"""Runs of pretraining that start from the weights of a model that exists."""

import shutil

import pytest
import torch
import yaml
from PIL import Image

from crate_mae.commands.train import pretrain, resume
from crate_mae.errors import UserError
from crate_mae.models import create_model
from crate_mae.models.weights import load, save
from tests.training.conftest import TINY_MODEL, TINY_RUN, at_step, weights

NANO = "crate_mae_nano_patch2_8"
BUNDLED = "crate_mae_micro_monotone_cifar10"
DATA = "digits:test"
OWN = {key: value for key, value in TINY_RUN.items() if key != "model_settings"}


@pytest.fixture
def start(tmp_path):
    """A model of images of 16 pixels in 4 x 4 patches, in a folder."""
    torch.manual_seed(3)
    folder = tmp_path / "start"
    save(create_model(NANO, **TINY_MODEL, image_size=16, patch_size=4, in_chans=1, mean=(0.5,), std=(0.5,)), folder)
    return folder


def test_a_run_starts_from_a_model_of_its_own_kind_and_says_so(start, tmp_path, capsys):
    run = pretrain(DATA, init_from=start, out=tmp_path / "run", **OWN | {"quiet": False, "lr": 1e-9})
    model, was = load(run.path), load(start)
    assert (model.config.image_size, model.config.patch_size, model.config.embed_dim) == ((8, 8), 2, 24)
    torch.testing.assert_close(model.encoder.blocks[1].ista.dictionary, was.encoder.blocks[1].ista.dictionary)
    assert f"starts from    {start}: all weights" in capsys.readouterr().out
    assert yaml.safe_load((run.path / "config.yaml").read_text())["init_from"] == str(start)


@pytest.mark.parametrize(("side", "is_advised"), [(32, True), (16, False)])
def test_for_few_images_the_bundled_model_is_advised(side, is_advised, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (side, side), (number, 9 * number, 40)).save(tmp_path / "images" / f"{number}.png")
    run = {"steps": 9, "warmup_epochs": 0.0, "dry_run": True, "model": "crate_mae_nano_patch2_8", "image_size": side}
    pretrain(tmp_path / "images", out=tmp_path / "run", **run)
    plan = " ".join(capsys.readouterr().out.split())
    assert ("random initialisation; with few images, --recipe few_images" in plan) == is_advised


def test_a_run_goes_on_without_the_model_that_it_started_from(start, tmp_path, monkeypatch):
    whole = pretrain(DATA, init_from=start, out=tmp_path / "whole", **OWN)
    at_step(monkeypatch, 10, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain(DATA, init_from=start, out=tmp_path / "parts", **OWN | {"checkpoint_minutes": 1e-6})
    monkeypatch.undo()
    shutil.rmtree(start)
    assert weights(resume(tmp_path / "parts", quiet=True).path) == weights(whole.path)


def test_of_a_named_model_what_fits_is_taken(start, tmp_path, capsys):
    settings = {"model": NANO, "model_settings": TINY_MODEL | {"depth": 3}}
    run = pretrain(DATA, init_from=start, out=tmp_path / "run", **OWN | settings | {"quiet": False, "lr": 1e-9})
    assert len(load(run.path).encoder.blocks) == 3
    assert "random initialisation: encoder.blocks.2" in capsys.readouterr().out


def test_a_run_that_started_from_another_model_is_another_run(start, tmp_path):
    pretrain(DATA, init_from=start, out=tmp_path / "run", **OWN)
    with pytest.raises(UserError, match="init_from: "):
        pretrain(DATA, init_from=BUNDLED, out=tmp_path / "run", **OWN)


def test_an_interrupted_run_from_random_weights_is_explained(tmp_path, monkeypatch):
    """Earlier versions took such a name, and then a run may have been killed before its first checkpoint."""
    run = pretrain(DATA, out=tmp_path / "run", **OWN | {"steps": 1}).path
    for name in ("checkpoints", "model.safetensors", "config.json", "SHA256SUMS"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("init_from: null", f"init_from: {NANO}"))
    with pytest.raises(UserError, match=rf"was interrupted(.|\n)*starts? from {NANO}(.|\n)*`init_from: null`"):
        resume(run, quiet=True)
    (run / "config.yaml").write_text(config)
    assert resume(run, quiet=True).metrics()[-1]["step"] == 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "nowhere does not exist and is not the name of a model"),
        (BUNDLED, f"--init-from {BUNDLED}: no matrix of its encoder layers fits"),
        (NANO, f"--init-from {NANO} names a random initialisation"),
        (f"{BUNDLED}:untrained", f"--init-from {BUNDLED}:untrained names a random"),
    ],
)
def test_a_model_that_cannot_be_started_from_is_refused(model, words, tmp_path):
    with pytest.raises(UserError, match=words):
        pretrain(DATA, model=NANO, model_settings=TINY_MODEL, init_from=model, out=tmp_path / "run", **OWN)
    assert not (tmp_path / "run").exists()
