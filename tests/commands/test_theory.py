"""The command `theory`: its files, its errors, and that other files stay unchanged."""

import dataclasses
import importlib

import pytest

from crate_mae.errors import UserError
from crate_mae.interpret.claims import report

theory = importlib.import_module("crate_mae.commands.reports").theory
NAMES = {"denoising", "attention", "signal_to_noise", "diffusion", "ista"}
FILES = {"theory.html", "theory.json", *(f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf"))}


@pytest.fixture(scope="module")
def one_draw():
    return report.measure_theory(draws=1)


@pytest.fixture
def quick(one_draw, monkeypatch):
    monkeypatch.setattr(report, "measure_theory", lambda seed: dataclasses.replace(one_draw, seed=seed))


def test_it_writes_a_page_numbers_and_figures(quick, crate_mae_command, tmp_path):
    out = tmp_path / "new" / "empty"
    out.mkdir(parents=True)
    code, text, error = crate_mae_command("theory", "--out", out, "--seed", "3")
    assert code == 0, error
    assert str(out / "theory.html") in text
    assert {path.name for path in out.iterdir()} == FILES
    assert "--seed 3" in (out / "theory.html").read_text(encoding="utf-8")
    assert (out / "ista.pdf").read_bytes().startswith(b"%PDF")
    assert (out / "ista.png").read_bytes().startswith(b"\x89PNG")


def test_overwrite_replaces_files_and_keeps_others(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "encode", lambda _, kind: kind.encode())  # drawing takes most of the time
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "theory.html").write_text("old")
    assert theory(out=tmp_path, overwrite=True, quiet=True) == tmp_path / "theory.html"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "checked" in (tmp_path / "theory.html").read_text(encoding="utf-8")


def test_a_folder_with_files_is_refused(crate_mae_command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = crate_mae_command("theory", "--out", tmp_path)
    assert code == 2
    assert "is not empty" in error
    assert "--overwrite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        theory(out=tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="--seed is -1"):
        theory(out=tmp_path / "out", seed=-1)
    assert not (tmp_path / "out").exists()
