import errno
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import Timeout
from PIL import Image

from crate_mae.cli import main
from crate_mae.commands.train import pretrain, resume
from crate_mae.data import ImageFacts, open_source, suggest_model
from crate_mae.errors import RunStopped, UserError
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.checkpoints import newest_checkpoint
from crate_mae.training import checkpoint, run_directory
from crate_mae.training.images import _found_again, split_record
from crate_mae.training.preflight import ProbeResult
from crate_mae.training.pretraining import Monitor
from crate_mae.training.run_directory import RunDirectory
from tests.training.conftest import at_step, weights


def kept_columns(run):
    """metrics.csv without speeds."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in run.metrics()]


@pytest.fixture
def photos(tmp_path):
    """`photos(n, bad)`: a folder of n small pictures, of which the first `bad` are no pictures."""

    def make(number, bad=0, name="photos"):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(number):
            path = folder / f"{i:03}.png"
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
            if i < bad:
                path.write_bytes(path.read_bytes()[:50])
        return folder

    return make


def test_a_run_learns_and_leaves_everything_that_its_folder_promises(tiny_run, written_report, capsys):
    run = tiny_run(data="digits", batch_size=32, lr=4e-3, quiet=False, steps=60, monitor_steps=30)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, *range(3, 61, 3)]
    held_out = {row["step"]: row["held_out_loss"] for row in rows if row["held_out_loss"] is not None}
    assert list(held_out) == [0, 30, 60]
    assert held_out[60] < 0.7 * held_out[0]
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "command.txt", "environment.json", "log.txt", "metrics.csv", "layers.csv"),
        *("checkpoints", "pictures", "report.html", "model.safetensors", "config.json", "SHA256SUMS", ".lock"),
        "held_out.json",
    }
    assert sorted(path.name for path in (run.path / "pictures").iterdir()) == [
        "step-0.png",
        "step-30.png",
        "step-60.png",
    ]
    assert run.model().num_patches == 16
    shown = capsys.readouterr().out
    plan = [line for line in shown[: shown.index("Finished")].splitlines() if not line.startswith("step ")]
    assert len(plan) <= 15  # a slow machine tells its steps as well
    assert "0.004 x 32/256 = 0.0005" in shown and "1,708 of digits; 89 held out" in shown
    assert f"crate-mae resume {run.path}" in shown and f"crate-mae reconstruct {run.path} digits" in shown


def test_a_dry_run_shows_the_plan_and_writes_nothing(tiny_run, tmp_path, capsys):
    tiny_run(dry_run=True, quiet=False)
    text = capsys.readouterr().out
    assert "283 of digits:test" in text and "nothing has been written" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_as_json_is_all_that_stands_on_the_standard_output(tiny_run, tmp_path, capsys):
    run = tiny_run(dry_run=True, json=True, quiet=False)
    shown = capsys.readouterr()
    plan = json.loads(shown.out)
    assert plan.keys() == {
        *("command", "out", "options", "parameters", "train_images", "held_out_images", "steps_per_epoch", "processes"),
        *("device", "seconds_per_step", "seconds", "memory_bytes", "plan", "finished"),
    }
    assert plan["finished"] is False
    assert (plan["train_images"], plan["held_out_images"], plan["steps_per_epoch"]) == (283, 14, 11)
    assert plan["options"]["lr"] == run.config.lr and "283 of digits:test" in plan["plan"]["images"]
    assert "nothing has been written" in shown.err
    with pytest.raises(UserError, match="add --dry-run, or leave out --json"):
        tiny_run(json=True)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_finished_run_as_json_says_that_it_is_finished(tiny_run, capsys):
    run = tiny_run(steps=2)
    tiny_run(steps=2, dry_run=True, json=True, quiet=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["out"], found["finished"]) == ("pretrain", str(run.path), True)
    assert found["options"]["steps"] == 2


def test_a_run_of_an_earlier_version_goes_on_with_columns_that_it_did_not_have(tiny_run, tmp_path, monkeypatch):
    whole = tiny_run("whole")
    stopped_at(monkeypatch, 6, tiny_run)
    checkpoint_folder = tmp_path / "run" / "checkpoints" / "step-7"
    for table in (tmp_path / "run" / "metrics.csv", checkpoint_folder / "metrics.csv"):
        rows = [row.split(",") for row in table.read_text().splitlines()]
        dropped = [rows[0].index(name) for name in ("feature_cosine", "knn_accuracy")]
        rows = [[cell for place, cell in enumerate(row) if place not in dropped] for row in rows]
        table.write_text("".join(",".join(row) + "\n" for row in rows))
    (checkpoint_folder / "SHA256SUMS").unlink()
    (tmp_path / "run" / "held_out.json").unlink()
    run = resume(tmp_path / "run", quiet=True)
    assert weights(run.path) == weights(whole.path)
    assert [row["feature_cosine"] is None for row in run.metrics() if row["held_out_loss"]] == [True, False, False]
    assert (run.path / "held_out.json").read_text() == (whole.path / "held_out.json").read_text()


def test_tensorboard_gets_the_same(tiny_run):
    pytest.importorskip("tensorboard")
    run = tiny_run(steps=3, trackers=("tensorboard",))
    assert [path.name.split(".")[0] for path in (run.path / "tensorboard").iterdir()] == ["events"]


def test_accumulated_micro_batches_give_the_weights_of_one_batch(tiny_run):
    one, two = tiny_run("one").model().state_dict(), tiny_run("two", accumulation=2).model().state_dict()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


def test_layers_computed_twice_give_the_same_weights(tiny_run):
    one, two = (
        tiny_run(str(twice), grad_checkpointing=twice, drop_path=0.2).model().state_dict() for twice in (False, True)
    )
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny_run):
    first = tiny_run("a", drop_path=0.3)
    torch.manual_seed(123)
    assert weights(tiny_run("b", drop_path=0.3).path) == weights(first.path)
    assert weights(tiny_run("c", drop_path=0.3, seed=1).path) != weights(first.path)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resuming_gives_the_weights_of_a_run_never_stopped(tiny_run, monkeypatch, capsys, number):
    whole = tiny_run("whole", drop_path=0.2)
    with monkeypatch.context() as patch, pytest.raises(RunStopped) as stopped:
        at_step(patch, 6, lambda: os.kill(os.getpid(), number))
        tiny_run("stopped", drop_path=0.2, quiet=False)
    assert stopped.value.signal == number
    assert "Stopped and saved at step 7. To continue: crate-mae resume" in capsys.readouterr().out
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    resumed = resume(whole.path.with_name("stopped"), quiet=True)
    assert weights(resumed.path) == weights(whole.path)
    assert kept_columns(resumed) == kept_columns(whole)
    assert (resumed.path / "layers.csv").read_text() == (whole.path / "layers.csv").read_text()


@pytest.mark.usefixtures("usual_signals")
def test_a_background_job_ignores_ctrl_c(tiny_run, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert tiny_run(steps=4).metrics()[-1]["step"] == 4


def test_the_same_command_resumes_and_a_finished_run_is_left_alone(tiny_run, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run()
    run = tiny_run(workers=0, log_steps=1)
    assert run.config.log_steps == 1
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert tiny_run(quiet=False) == run
    assert "is finished: 20 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_another_configuration_is_refused_with_the_differing_options(tiny_run, tmp_path):
    run = tiny_run(steps=2, model="crate_mae_nano_patch2_8")
    with pytest.raises(UserError) as refused:
        pretrain("digits:test", out=run.path, epochs=1, seed=3, recipe="digits", min_crop=0.2, quiet=True)
    assert str(refused.value).splitlines() == [
        f"{run.path} already holds a run of 2 steps with other options:",
        "  model: crate_mae_nano_patch2_8 in that run, crate_mae_nano_isometric_patch2_8 now (from the recipe digits)",
        "  mask_ratio: 0.75 in that run, 0.5 now (from the recipe digits)",
        "  steps: 2 in that run, 5 now (--epochs)",
        "  batch_size: 24 in that run, 50 now (from the recipe digits)",
        "  lr: 0.005 in that run, 0.002715 now (from the recipe digits)",
        "  flip: True in that run, False now (from the recipe digits)",
        "  seed: 0 in that run, 3 now (--seed)",
        f"To continue that run as it is: crate-mae resume {run.path}. For a new run, give another --out.",
    ]


def test_data_that_has_changed_is_refused(tiny_run, photos, monkeypatch):
    folder = photos(40)
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run(data=folder, batch_size=4)
    shutil.copy(folder / "000.png", folder / "new.png")
    with pytest.raises(
        UserError, match=r"trains on 38 images, but there are more in its data now(.|\n)*resume .*--data-changed"
    ):
        tiny_run(data=folder, batch_size=4)


def stopped_at(monkeypatch, step, run):
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run()


def held_out_files(run, folder):
    """Contents of the images that a run holds out, from its folder of images as it is now."""
    record = json.loads((run / "held_out.json").read_text())
    files = sorted(folder.iterdir())
    assert record["images"] == len(files)
    return {files[i].read_bytes() for i in record["held_out"]}


@pytest.mark.usefixtures("usual_signals", "written_report")
def test_a_run_goes_on_without_the_files_that_it_could_not_read(tiny_run, photos, tmp_path, capsys):
    """What the message advises: remove them, and resume; some are added too."""
    folder, out = photos(60, bad=3), tmp_path / "run"
    options = {"data": folder, "batch_size": 8, "warmup_epochs": 1.0, "steps": 40}
    with pytest.raises(UserError, match=r"Fix or remove them, then: crate-mae resume .* --data-changed") as refused:
        tiny_run(**options, max_bad=0.02)
    assert "a larger --max-bad" in str(refused.value)
    before, begun = held_out_files(out, folder), newest_checkpoint(out).name
    bad = [row["location"] for row in RunDirectory(out).bad_files.read()]
    assert bad
    for location in bad:
        Path(location).unlink()
    for path in photos(9, name="more").iterdir():
        pixels = 255 - np.asarray(Image.open(path))
        Image.fromarray(pixels).save(folder / f"a{path.name}")  # numbers of all others change
    with pytest.raises(UserError, match=r"trains on 57 images, but there are more in its data now"):
        resume(out, quiet=True)
    run = resume(out, data_changed=True)
    assert held_out_files(out, folder) <= before, "those of before, less what is gone; nothing that was trained on"
    (change,) = RunDirectory(out).data_changes.read()
    assert begun == f"step-{change['step']}" and int(change["images_before"]) == 57
    sentence = f"From step {change['step']} the run has other data"
    assert sentence in capsys.readouterr().out.split("Finished step 40")[-1]
    assert sentence in (out / "log.txt").read_text().split("End:")[-1]
    assert sentence in (out / "report.html").read_text()
    rows = {row["step"]: row for row in run.metrics()}
    assert max(rows) == 40 and rows[40]["bad_images"] == len(RunDirectory(out).bad_files.read()) <= 3 - len(bad)
    assert tiny_run(**{**options, "max_bad": 0.5}, quiet=False).config == run.config, "the same command agrees"


def test_what_goes_on_with_other_images_is_the_same_whenever_it_is_interrupted(tiny_run, photos, tmp_path, monkeypatch):
    def changed_run(name, *, again):
        folder = photos(60, name=f"photos-{name}")
        options = {"data": folder, "batch_size": 8, "checkpoint_epochs": 1, "steps": 30, "warmup_epochs": 1.0}
        stopped_at(monkeypatch, 4, lambda: tiny_run(name, **options))
        for number in (1, 2, 3, 30, 31, 32, 40, 41):
            (folder / f"{number:03}.png").unlink(missing_ok=True)
        if again:
            stopped_at(monkeypatch, 9, lambda: resume(tmp_path / name, data_changed=True, quiet=True))
            return resume(tmp_path / name, quiet=True)
        return resume(tmp_path / name, data_changed=True, quiet=True)

    whole, parts = changed_run("whole", again=False), changed_run("parts", again=True)
    assert weights(whole.path) == weights(parts.path)
    assert kept_columns(whole) == kept_columns(parts)
    rates = {row["step"]: row["lr"] for row in whole.metrics()}
    plain = {
        row["step"]: row["lr"]
        for row in tiny_run("plain", data=photos(60), batch_size=8, steps=30, warmup_epochs=1.0).metrics()
    }
    assert rates == plain, "the schedule is that of the plan, in steps"


def test_a_python_data_set_is_resumed_from_python(tiny_run, tmp_path, monkeypatch):
    dataset = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(50)]
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run(data=dataset, batch_size=4)
    with pytest.raises(UserError, match=r"Python object \(list\).*\n.*crate_mae.pretrain\(your_dataset"):
        resume(tmp_path / "run")
    assert tiny_run(data=dataset, batch_size=4).metrics()[-1]["step"] == 20


@pytest.mark.usefixtures("usual_signals")
def test_no_command_is_advised_for_a_run_whose_held_out_images_come_from_python(tiny_run, monkeypatch, capsys):
    val = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    stopped_at(monkeypatch, 2, lambda: tiny_run(val=val, quiet=False))
    output = capsys.readouterr().out
    assert "To continue: the same call of crate_mae.pretrain from Python" in output
    assert "crate-mae resume" not in output
    with pytest.raises(
        UserError,
        match="The held-out images have changed since this run started \\(names, contents or classes\\), although",
    ) as refused:
        tiny_run(val=[1 - image for image in val])
    assert "--data-changed" not in str(refused.value)
    assert tiny_run(val=val).metrics()[-1]["step"] == 20


def test_unreadable_images_are_listed_and_replaced(tiny_run, photos):
    run = tiny_run(data=photos(60, bad=1), batch_size=8, max_bad=0.5)
    (row,) = (run.path / "bad_files.csv").read_text().splitlines()[1:]
    assert "000.png" in row
    assert run.metrics()[-1]["bad_images"] == 1


@pytest.mark.parametrize(("good", "bad"), [(0, 1), (3, 12)])
def test_held_out_images_that_cannot_be_read_are_reported_before_anything_is_written(
    tiny_run, photos, tmp_path, good, bad
):
    with pytest.raises(UserError, match=f"{bad} of {good + bad} held-out images cannot be read"):
        tiny_run(data=str(photos(24)), val=str(photos(good + bad, bad=bad, name="val")), batch_size=8)
    assert not (tmp_path / "run").exists()


def test_one_unreadable_held_out_image_among_others_is_listed(tiny_run, photos):
    run = tiny_run(data=str(photos(24)), val=str(photos(5, bad=1, name="val")), batch_size=8, steps=2)
    listed = (run.path / "bad_files.csv").read_text().splitlines()
    assert len(listed) == 2
    assert "000.png" in listed[1]


@pytest.mark.parametrize("broken", [(run_directory, "write_whole"), (run_directory, "_locked"), (os, "fsync")])
def test_a_disk_that_is_full_at_the_start_leaves_nothing(tiny_run, tmp_path, monkeypatch, broken):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*broken, full)
    with pytest.raises(UserError, match=r"[Nn]o space left on device"):
        tiny_run()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_that_began_at_the_same_time_stays(tiny_run, tmp_path, monkeypatch):
    def held(lock):  # by the other, which has made the folder since this one looked
        (lock.parent / "config.yaml").write_text("of the other run")
        raise Timeout(str(lock))

    monkeypatch.setattr(run_directory, "_locked", held)
    with pytest.raises(UserError, match="by another run"):
        tiny_run()
    assert (tmp_path / "run" / "config.yaml").read_text() == "of the other run"


def test_too_many_unreadable_images_stop_the_run_which_can_be_resumed(tiny_run, photos):
    folder = photos(60, bad=9)
    with pytest.raises(UserError, match=r"cannot be read, more than --max-bad 0.02(.|\n)*bad_files.csv"):
        tiny_run(data=folder, batch_size=8, max_bad=0.02)
    run = tiny_run(data=folder, batch_size=8, max_bad=0.5)
    listed = (run.path / "bad_files.csv").read_text().splitlines()[1:]
    assert len(listed) == 9
    assert weights(run.path) == weights(tiny_run("whole", data=folder, batch_size=8, max_bad=0.5).path)


@pytest.fixture
def broken_steps(monkeypatch):
    """A set of steps, counted from 1, in which the loss is not a number."""
    usual, broken, calls = MaskedAutoencoder.forward, set(), []

    def forward(model, *arguments, **options):
        calls.append(model.training)
        output = usual(model, *arguments, **options)
        is_broken = model.training and sum(calls) in broken
        return output._replace(loss=output.loss * (float("nan") if is_broken else 1.0))

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    monkeypatch.setattr("crate_mae.training.start.probe", lambda *_: ProbeResult("float32", "", 1.0, 0.0, None))
    monkeypatch.setattr("crate_mae.training.start.refuse_too_large", lambda *_: None)  # it computes losses, too
    return broken


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(tiny_run, broken_steps):
    broken_steps |= {3, 5, 6}
    run = tiny_run()
    assert [row["skipped_steps"] for row in run.metrics()[1:4]] == [1, 3, 3]
    assert all(torch.isfinite(value).all() for value in run.model().state_dict().values())


def test_five_such_steps_in_a_row_stop_the_run_with_advice(tiny_run, broken_steps):
    broken_steps |= {3, *range(9, 99)}
    with pytest.raises(UserError, match=r"5 steps in a row, up to step 13(.|\n)*step-11\.(.|\n)*--lr"):
        tiny_run(checkpoint_epochs=1)


def test_a_short_run_of_such_steps_alone_is_not_called_finished(tiny_run, broken_steps, tmp_path):
    broken_steps |= {1, 2, 3}
    with pytest.raises(UserError, match="3 steps in a row, up to step 3"):
        tiny_run(steps=3)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def made_once():
    """What tests of this file have made for the others."""
    return {}


@pytest.fixture
def whole_weights(tiny_run, made_once):
    """Those of the usual run."""
    if not made_once:
        made_once["weights"] = weights(tiny_run("whole").path)
    return made_once["weights"]


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["checkpoint", "picture", "metrics"])
def test_a_full_disk_stops_the_run_with_a_sentence_and_a_whole_checkpoint(
    tiny_run, whole_weights, tmp_path, monkeypatch, what
):
    targets = {
        "checkpoint": (checkpoint, "save_file"),
        "picture": (Monitor, "picture"),
        "metrics": (checkpoint.TrainState, "count"),
    }
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: patch.setattr(*targets[what], full_disk))
        with pytest.raises(UserError, match=r"the disk is full(.|\n)*up to step-11 is saved(.|\n)*crate-mae resume"):
            tiny_run(checkpoint_epochs=1)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last", "step-11"]
    assert weights(resume(tmp_path / "run", quiet=True).path) == whole_weights


def test_autocast_around_a_run_changes_nothing(tiny_run):
    plain = tiny_run("plain", steps=4, precision="bfloat16").model().state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        around = tiny_run("around", steps=4, precision="bfloat16").model().state_dict()
    assert all(torch.equal(plain[name], around[name]) for name in plain)


@pytest.fixture
def speed(monkeypatch):
    """`speed(step, image)`: steps and reading an image take so many seconds each, as far as is measured."""

    def measured(step, image=0.0):
        monkeypatch.setattr("crate_mae.training.start.probe", lambda *_: ProbeResult("float32", "", step, image, None))

    return measured


def test_a_run_of_minutes_has_the_steps_that_fit(tiny_run, speed, capsys):
    options = {"steps": None, "minutes": 1000, "dry_run": True}
    speed(60.0)
    assert tiny_run(**options).config.steps in (948, 949), "95% of 1,000, less the seconds that the preparation took"
    speed(30.0, 1.25)  # 24 images of 1.25 s
    assert tiny_run(**options).config.steps in (948, 949)
    speed(60.0, 1.25)
    assert tiny_run(**options, workers=2).config.steps in (948, 949), "they are read while others are trained on"
    with pytest.raises(UserError, match=r"--minutes 0.0001 is too short: preparing the run takes .*, and a step 90 s"):
        tiny_run(**options | {"minutes": 0.0001})


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_a_short_run_takes_smaller_steps_rather_than_few(tiny_run, speed, monkeypatch, share):
    monkeypatch.setattr("crate_mae.training.start._SMALLEST_BATCH", 8)
    monkeypatch.setattr("crate_mae.training.start._SHARE_OF_TIME_FOR_MEASURING", share)
    sizes = []

    def probe(_task, images, _accelerator):
        sizes.append(images)
        return ProbeResult("float32", "", 60.0 + 10 * images, 0.0, None)

    monkeypatch.setattr("crate_mae.training.start.probe", probe)
    found = tiny_run(steps=None, batch_size=None, minutes=1000, dry_run=True).config
    assert found.batch_size == 8
    if share:
        assert (sizes, round(found.steps, -1)) == ([32, 8, 8], 410)  # 95% of 60,000 s, by 140 s
    else:
        assert (sizes, round(found.steps, -1)) == ([32, 8], 600)  # by a quarter of 380 s, which may be too little
    shortest = tiny_run(steps=None, batch_size=None, minutes=5, dry_run=True).config
    assert (shortest.batch_size, shortest.steps in (1, 2)) == (8, True)  # not one step of 32 images fits
    speed(600.0)
    given = tiny_run(steps=None, batch_size=32, minutes=1000, dry_run=True).config
    assert (given.batch_size, given.steps in (93, 94)) == (32, True)


def test_a_run_too_short_for_large_images_takes_the_model_for_smaller_ones(tiny_run, tmp_path, monkeypatch, capsys):
    an_image = {224: 1.0, 128: 0.01}  # seconds

    def probe(task, images, _accelerator):
        return ProbeResult("float32", "", images * an_image[task.model.config.image_size[0]], 0.0, None)

    monkeypatch.setattr("crate_mae.training.start.probe", probe)
    monkeypatch.setattr("crate_mae.training.start.refuse_too_large", lambda *_: None)  # nine models, a second each
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (240, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    options = {"data": folder, "steps": None, "batch_size": None, "model_settings": None, "lr": None, "dry_run": True}

    def suggested(side):
        name, size = suggest_model(ImageFacts(3, side, side))
        return name, (size, size)

    short = tiny_run(**options, minutes=30, quiet=False).config
    assert (short.model, short.image_size) == suggested(128)
    plan = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"128 x 128 pixels \(from --minutes 30, in which a model for larger images would take \d+ steps\)", plan
    )
    chosen = tiny_run(**options, minutes=30, image_size=224).config
    assert chosen.image_size == (224, 224)
    an_image[224] = 300.0  # so that not one step fits
    assert tiny_run(**options, minutes=30).config.image_size == (128, 128)
    with pytest.raises(UserError, match="--minutes 30 is too short"):
        tiny_run(**options | {"batch_size": 16}, minutes=30, image_size=224)


def test_a_length_in_minutes_is_one_of_three(tiny_run, tmp_path):
    with pytest.raises(UserError, match="--steps and --minutes both set the length of the run"):
        tiny_run(minutes=3)
    run = tiny_run()
    with pytest.raises(UserError, match="already holds a run of 20 steps, whose length --minutes 3 cannot set"):
        pretrain("digits:test", out=run.path, minutes=3)


def test_a_long_plan_names_shorter_commands_that_work(tiny_run, speed, tmp_path, capsys):
    speed(600.0)
    tiny_run(dry_run=True, quiet=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("30-min run ")]
    commands = [line.split("  ", 1)[1].strip() for line in lines]
    given = "--batch-size 24 --precision float32 --workers 0 --threads 1 --log-steps 3 --no-trackers"
    assert commands == [
        f"crate-mae pretrain digits:test --out {tmp_path / 'run'}-30min --minutes 30 --model-settings.embed_dim 24 "
        "--model-settings.num_heads 2 --model-settings.depth 2 --model-settings.decoder_depth 2 --batch-size 24 "
        f"--lr 0.005 {given.removeprefix('--batch-size 24 ')}",
        f"crate-mae pretrain digits:test --out {tmp_path / 'run'}-30min-init --minutes 30 {given} "
        "--init-from crate_mae_micro_monotone_cifar10",
    ]
    for command in commands:
        main([*shlex.split(command)[1:], "--dry-run"])
    assert "(from the images' median of 8 x 8)" in capsys.readouterr().out
    tiny_run(dry_run=True, quiet=False, image_size=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("30-min run 1")]
    assert "--image-size 8x8 " in lines[0]
    main([*shlex.split(lines[0].split("  ", 1)[1])[1:], "--dry-run"])
    speed(1.0)
    tiny_run(dry_run=True, quiet=False)
    assert "30-min run" not in capsys.readouterr().out


def test_the_estimate_includes_reading(tiny_run, speed, capsys):
    speed(3.0, 0.125)
    tiny_run(dry_run=True, quiet=False)
    assert "estimate       2 min (50% of it for reading images)" in " ".join(capsys.readouterr().out.split("\n"))


def test_a_plan_names_a_copy_that_makes_it_much_faster(tiny_run, monkeypatch, capsys):
    def plan(image, reduced):
        found = ProbeResult("float32", "", 3.0, image, None, reduced)
        monkeypatch.setattr("crate_mae.training.start.probe", lambda *_: found)
        tiny_run(dry_run=True, quiet=False)
        return capsys.readouterr().out

    faster = plan(1.0, (19, 0.125))  # 20 steps of 24 images, in the process itself
    command = "`crate-mae data resize digits:test COPY --size 19`"
    assert f"read faster    on a copy made by {command} the run takes 2 min: reading an image takes 125.0 ms" in faster
    assert "9 min (89% of it for reading images)" in faster
    for image, reduced in ((1.0, None), (1.0, (19, 0.9))):
        assert "read faster" not in plan(image, reduced)


def test_images_that_cannot_be_read_are_never_found_again():
    class Scans:
        broken = (1, 3)

        def __len__(self):
            return 6

        def __getitem__(self, i):
            if i in self.broken:
                raise OSError("the disk is gone")
            return np.full((8, 8), 40 * i, dtype=np.uint8)

    record = split_record(open_source(Scans()), np.array([1, 2]))
    assert record["sha256"][0] == "" and len(record["sha256"][1]) == 64
    for known in (record, record | {"sha256": ["unreadable", record["sha256"][1]]}):  # as once written
        assert _found_again(open_source(Scans()), known).tolist() == [2]
