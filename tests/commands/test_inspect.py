"""The command `inspect`: its files, what it knows of a run, and its mistakes."""

import importlib
import json

import pytest

import crate_mae
from crate_mae.errors import UserError
from crate_mae.interpret.report import html, inspection

command = importlib.import_module("crate_mae.commands.reports")
inspect = command.inspect
MODEL = "crate_mae_nano_patch2_8"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures and untrained draws take the time, and are tested elsewhere."""
    monkeypatch.setattr(inspection, "UNTRAINED_DRAWS", 1)
    monkeypatch.setattr(
        html, "draw_figures", lambda plan: {figure.name: figure for section in plan.values() for figure in section}
    )
    monkeypatch.setattr(html, "encode", lambda _, kind: kind.encode())


def test_it_writes_a_page_numbers_and_figures(undrawn, crate_mae_command, tmp_path):
    out = tmp_path / "new" / "empty"
    out.mkdir(parents=True)
    code, text, error = crate_mae_command("inspect", MODEL, "digits:test", "--out", out, "--count", 2, "--seed", 3)
    assert code == 0, error
    assert "report.html" in text
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "measures.json", "measures.csv", "audit.csv", "attention.csv", "atoms.csv", "figures")
    }
    names = {path.stem for path in (out / "figures").iterdir()}
    assert {f"{name}.{kind}" for name in names for kind in ("png", "pdf")} == {
        path.name for path in (out / "figures").iterdir()
    }
    settings = json.loads((out / "measures.json").read_text())["settings"]
    assert (settings["model"], settings["count"], settings["seed"]) == (MODEL, 2, 3)
    assert "--seed 3" in (out / "report.html").read_text(encoding="utf-8")


def test_a_run_tells_of_its_training(undrawn, tmp_path):
    run = tmp_path / "run"
    crate_mae.pretrain(
        "digits:train", out=run, steps=3, batch_size=5, mask_ratio=0.5, workers=0, quiet=True, trackers=()
    )
    path = inspect(str(run), "digits:test", out=tmp_path / "report", count=2, probe_images=0, quiet=True)
    assert path == tmp_path / "report" / "report.html"
    training = json.loads((tmp_path / "report" / "measures.json").read_text())["training"]
    assert (training["Images"], training["Steps"]) == ("digits:train", "3 of 5 images")
    assert (training["Finished"], training["Hidden in training"]) == ("yes", "50% of the patches")
    page = path.read_text(encoding="utf-8")
    assert "50% of the patches hidden" in page  # completions as in training
    assert "may not hold on others" not in page
    again = inspect(str(run), "digits:train", out=tmp_path / "again", count=2, probe_images=0, quiet=True)
    assert "trained on images of digits:train: what holds on these images may not hold on others" in again.read_text(
        encoding="utf-8"
    )
    (run / "config.yaml").write_text("nonsense: 1\n")
    assert "unknown" in command._training(run).lines["Options"]


def test_a_report_that_is_there_stays(crate_mae_command, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    code, _, error = crate_mae_command("inspect", MODEL, "digits:test", "--out", tmp_path)
    assert code == 2
    assert "exists already" in error
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"is a file|Cannot write into"):
            inspect(MODEL, "digits:test", out=out)


def test_nothing_is_written_after_a_mistake(crate_mae_command, tmp_path):
    for words in (
        ["no/model", "digits:test"],
        [MODEL, "no/data"],
        [MODEL, "digits:test", "--count", "0"],
        [MODEL, "digits:test", "--seed", str(2**64)],
        [MODEL, "digits:test", "--foregrounds", "no/masks"],
    ):
        code, _, error = crate_mae_command("inspect", *words, "--out", tmp_path / "report")
        assert code == 2
        assert error.startswith("Error:")
        assert not (tmp_path / "report").exists()
