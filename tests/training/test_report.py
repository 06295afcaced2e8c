"""The report of a run: its content, when it is written, and that it cannot harm the run."""

import logging
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

from crate_mae.commands.train import resume
from crate_mae.errors import RunStopped
from crate_mae.training import report as report_module
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.images import open_images
from crate_mae.training.pretraining import Pretraining
from crate_mae.training.processes import StopRequest
from crate_mae.training.report import RunReport, curve, draw_layer_signals, draw_learning
from crate_mae.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("written_report")

ROWS = [
    {"step": 0.0, "loss": None, "lr": None, "held_out_loss": 1.5, "feature_rank": 3.0, "images_per_second": None},
    {"step": 3.0, "loss": 1.2, "lr": 0.1, "held_out_loss": None, "feature_rank": None, "images_per_second": 70.0},
    {"step": 5.0, "loss": float("nan"), "lr": 0.2, "held_out_loss": 0.7, "feature_rank": 2.0, "images_per_second": 7.0},
]


def page_of(run):
    return RunDirectory(run.path).report.read_text(encoding="utf-8")


def text_of(page):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).split())


def lines_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_a_finished_run_has_a_page_with_everything_inside(tiny_run):
    run = tiny_run("a & b")
    page = page_of(run)
    text = text_of(page)
    assert "crate-mae pretrain: a &amp; b" in text
    assert re.search(r"Finished step 20 after \d+ s, peak memory \d+\.\d GiB\. Loss on held-out images:", text)
    assert re.search(r"before training, [\d.]+ now, (below|NOT below) [\d.]+ for flat patches\.", text)
    for fact in (
        "283 of digits:test",
        "crate_mae_nano_isometric_patch2_8, 0.01 M parameters",
        "24 = 24 x 1",
        "mask_ratio: 0.75",
    ):
        assert fact in text
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 3  # learning, layers, completed images
    assert "<script" not in page and "http" not in page
    assert "Held-out images at step 20." in text
    assert not [name for name in run.path.iterdir() if name.name.startswith(".report")]
    assert "could not be written" not in (run.path / "log.txt").read_text()


def test_a_run_of_fine_tuning_has_one_too(tiny_finetuning):
    page = page_of(tiny_finetuning(steps=4, monitor_steps=2))
    assert "Finished step 4" in text_of(page) and "Accuracy on validation images:" in text_of(page)
    assert page.count("<img") == 1


def test_a_model_without_subspaces_and_codes_has_no_curves_of_layers(tiny_run):
    page = page_of(tiny_run(model="vit_mae_nano_patch2_8", steps=3))
    assert page.count("<img") == 2 and "<h2>Layers</h2>" not in page


def test_a_stopped_run_reports_its_progress_and_a_resumed_one_that_it_is_finished(tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(StopRequest, "signal", signal.SIGTERM)
        tiny_run(monitor_steps=1)
    stopped = text_of((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "Step 1 of 20. The run has stopped: stopped by SIGTERM and saved after step 1. Loss" in stopped
    assert "Reload the page" not in stopped and f"crate-mae resume {tmp_path / 'run'}" in stopped
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.splitlines()[-1].endswith("End: stopped by SIGTERM and saved after step 1.")
    state = tmp_path / "run" / "checkpoints" / "step-1" / "state.json"
    state.write_text(state.read_text().replace('"seconds": ', '"seconds": 36'))  # it has taken minutes so far
    (tmp_path / "run" / "checkpoints" / "step-1" / "SHA256SUMS").unlink()
    finished = text_of(page_of(resume(tmp_path / "run", quiet=True)))
    assert re.search(r"Finished step 20 after \d+ s \(\d+ min in total, over all starts\)", finished)
    assert "Reload the page" not in finished
    assert "End: finished." in (tmp_path / "run" / "log.txt").read_text()
    assert "resuming : at step 1" in finished


def test_a_failed_run_says_with_what(tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(TrainState, "count", lambda *_: (_ for _ in ()).throw(RuntimeError("odd\nend")))
        tiny_run(monitor_steps=1)
    run = tmp_path / "run"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The run has stopped: failed: odd (RuntimeError) after step 0." in text_of(page)
    assert "End: failed: odd (RuntimeError) after step 0." in (run / "log.txt").read_text()


def test_what_cannot_be_drawn_is_a_warning_and_not_the_end_of_a_run(tiny_run, monkeypatch, caplog):
    def fail(_rows):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report_module, "draw_learning", fail)
    with caplog.at_level(logging.WARNING, logger="crate_mae"):
        run = tiny_run(steps=3)
    assert RunDirectory(run.path).is_finished
    assert not (run.path / "report.html").exists()
    log = (run.path / "log.txt").read_text()
    assert "WARNING" in log and "report.html could not be written; the run continues" in log and "no fonts" in log


@pytest.fixture
def clocked(tmp_path, monkeypatch, config, tiny_model):
    """A report of a run that is measured after every second step, at times and with costs that the test decides."""
    clock = SimpleNamespace(now=100.0, cost=0.0, drawn=[])

    def draw(*_arguments):
        clock.drawn.append(clock.now)
        clock.now += clock.cost
        return "page"

    monkeypatch.setattr(report_module, "render_report", draw)
    monkeypatch.setattr(report_module.time, "monotonic", lambda: clock.now)
    task = Pretraining(replace(config, image_size=(8, 8), out=tmp_path), open_images("digits"), tiny_model.config)
    assert task.config.monitor_steps == 2
    clock.report = lambda writes: RunReport(task, {}, writes=writes)
    return clock


@pytest.mark.parametrize(("cost", "wait"), [(0.1, 30.0), (2.0, 200.0)])
def test_drawing_takes_at_most_a_hundredth_of_the_time(clocked, cost, wait):
    clocked.cost = cost
    report = clocked.report(True)
    for step, later in ((2, 29.0), (3, 2.0), (4, 0.0), (6, wait - 1), (8, 2.0)):
        clocked.now += later
        report.update(step)
    assert clocked.drawn == [131.0, 131.0 + cost + wait + 1]
    report.close()
    assert len(clocked.drawn) == 3


def test_other_processes_draw_nothing(clocked, tmp_path):
    report = clocked.report(False)
    clocked.now += 1000
    report.update(2)
    report.close()
    assert clocked.drawn == list(tmp_path.iterdir()) == []


def test_curves_are_the_numbers_of_the_table():
    axes = draw_learning(ROWS).axes
    assert [panel.get_ylabel() for panel in axes] == [
        *("loss", "effective rank of images’ features", "learning rate", "images per second")
    ]
    assert lines_of(axes[0]) == {"training": [(3, 1.2)], "held-out images": [(0, 1.5), (5, 0.7)]}
    assert [list(points) for points in curve(ROWS, "lr")] == [[3, 5], [0.1, 0.2]]
    assert curve(ROWS, "val_accuracy") == ([], [])


def test_every_layer_has_its_line():
    rows = [
        {"step": str(step), "part": "encoder", "layer": str(layer), "measure": measure, "value": str(step + layer / 10)}
        for step in (0, 7)
        for layer in range(3)
        for measure in ("subspace_rate", "zero_fraction")
    ]
    first, second, _bar = draw_layer_signals(rows).axes
    for panel in (first, second):
        assert [line.get_ydata().tolist() for line in panel.lines] == [[0.0, 7.0], [0.1, 7.1], [0.2, 7.2]]
        assert len({line.get_color() for line in panel.lines}) == 3


def test_one_layer_and_one_step_are_enough():
    row = {"step": "0", "part": "encoder", "layer": "0", "measure": "zero_fraction", "value": "0.5"}
    assert draw_layer_signals([row]).axes[1].lines[0].get_ydata() == [0.5]
    assert draw_learning(ROWS[:1]).axes[0].lines
