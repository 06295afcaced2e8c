"""Bits that flip in the files of a run, at random places, are noticed; and what else happens to the files of a run."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.commands.train import finetune, pretrain, resume
from crate_mae.data import files
from crate_mae.data.files import DIGESTS_FILE
from crate_mae.errors import DivergedError, UserError
from crate_mae.models.checkpoints import newest_checkpoint
from crate_mae.models.weights import load
from crate_mae.training.progress import Display
from crate_mae.training.run_directory import Run, RunDirectory
from tests.training.conftest import TINY_RUN, cpu, no_report  # noqa: F401  # fixtures

SHORT = {**TINY_RUN, "steps": 16, "batch_size": 8, "checkpoint_epochs": 1, "log_steps": 1, "monitor_steps": 4}
FLIPS = 20
OF_A_CHECKPOINT = (
    "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "metrics.csv", "layers.csv", DIGESTS_FILE
)  # fmt: skip
OF_A_RUN = ("config.json", "model.safetensors", "metrics.csv", "layers.csv", "config.yaml", DIGESTS_FILE)


class Killed(BaseException):
    """Ends a run as a power cut does."""


def killed_at(step, run, *args, **options):
    """Start a run that ends right after a step."""
    usual = Display.step

    def end(display, number, *rest):
        if number == step:
            raise Killed
        usual(display, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Display, "step", end)
        run(*args, **options)


def noise(*seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def flipped(content, chance):
    damaged = bytearray(content)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(36):
        noise(i).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """A finished run, and the same killed at step 10, with checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("runs")
    killed_at(10, pretrain, images, out=folder / "killed", **SHORT)
    shutil.copytree(folder / "killed", folder / "finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "cut_back", lambda *_args, **_options: None)
        resume(folder / "finished", quiet=True)
    return folder


@pytest.fixture
def killed(runs, tmp_path):
    return shutil.copytree(runs / "killed", tmp_path / "run")


@pytest.fixture
def finished(runs, tmp_path):
    return shutil.copytree(runs / "finished", tmp_path / "run")


def results(run):
    rows = [row.split(",")[:9] for row in (run / "metrics.csv").read_text().splitlines()]
    return (run / "model.safetensors").read_bytes(), rows, (run / "layers.csv").read_bytes()


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_flipped_bit_in_a_checkpoint_is_noticed_and_the_one_before_is_taken(killed, name):
    file, chance = killed / "checkpoints" / "step-8" / name, random.Random(name)
    whole = file.read_bytes()
    assert newest_checkpoint(killed) == file.parent
    for _ in range(FLIPS):
        file.write_bytes(flipped(whole, chance))
        notes = []
        assert newest_checkpoint(killed, notes.append) == killed / "checkpoints" / "step-4"
        assert len(notes) == 1 and "step-8 is damaged" in notes[0] and "Continuing from step-4" in notes[0]
        assert f"{name} " in notes[0] or name == DIGESTS_FILE


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: (run / "checkpoints/step-8/model.safetensors").write_bytes(b""),
        lambda run: (run / "checkpoints/last").unlink(),
        lambda run: (run / "checkpoints/last").write_bytes(b"\xff\xfe\x00"),
    ],
    ids=["emptied", "last missing", "last no text"],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_says_so_and_ends_the_same(killed, runs, harm):
    harm(killed)
    (killed / "metrics.csv").write_bytes(b"\xef\xbb\xbf" + (killed / "metrics.csv").read_bytes())  # of a spreadsheet
    (killed / "pictures" / "step-8 (copy).png").write_bytes(b"")
    own = [killed / "checkpoints" / name for name in ("step-8-before-the-change", "step-notes.txt")]
    shutil.copytree(killed / "checkpoints" / "step-4", own[0])
    own[1].write_text("what I tried")
    resume(killed, quiet=True)
    assert results(killed) == results(runs / "finished")
    (warning,) = (line for line in (killed / "log.txt").read_text().splitlines() if "WARNING" in line)
    assert "Continuing from step-" in warning
    assert all(path.exists() for path in own)


def test_without_a_whole_checkpoint_nothing_is_begun_again_and_nothing_deleted(killed):
    for step in (4, 8):
        (killed / f"checkpoints/step-{step}/model.safetensors").write_bytes(b"")
    before = sorted(killed.rglob("*"))
    with pytest.raises(UserError, match=r"No checkpoint of .* is whole"):
        resume(killed, quiet=True)
    assert sorted(killed.rglob("*")) == before


def test_a_run_from_before_there_were_digests_goes_on(killed, runs):
    for folder in (killed / "checkpoints").glob("step-*"):
        for name in (DIGESTS_FILE, "metrics.csv", "layers.csv"):
            (folder / name).unlink()
        state = json.loads((folder / "state.json").read_text())
        for later in ("data", "options", "kept_step"):
            del state[later]
        (folder / "state.json").write_text(json.dumps(state))
    resume(killed, quiet=True)
    assert results(killed) == results(runs / "finished")


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_flipped_bit_in_a_finished_run_is_noticed(finished, name):
    file, chance = finished / name, random.Random(name)
    whole, directory = file.read_bytes(), RunDirectory(finished)
    assert directory.why_unfinished() is None
    for _ in range(FLIPS):
        file.write_bytes(flipped(whole, chance))
        reason = directory.why_unfinished()
        assert reason and (f"{name} " in reason or name == DIGESTS_FILE)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(UserError, match=f"{name} differs from its digest(.|\n)*crate-mae resume"):
            load(finished)
    if name == "metrics.csv":
        with pytest.raises(UserError, match=f"{name} differs from its digest(.|\n)*crate-mae resume"):
            Run(finished, directory.existing_config()).metrics()


def test_resuming_a_damaged_finished_run_writes_it_again(finished, runs):
    for name in ("model.safetensors", "metrics.csv", "config.json"):
        (finished / name).write_bytes(flipped((finished / name).read_bytes(), random.Random(0)))
    resume(finished, quiet=True)
    assert results(finished) == results(runs / "finished")
    assert RunDirectory(finished).why_unfinished() is None
    assert load(finished).config == load(runs / "finished").config


def test_a_damaged_finished_run_without_checkpoints_stays_as_it_is(finished):
    shutil.rmtree(finished / "checkpoints")
    resume(finished, quiet=True)
    (finished / "model.safetensors").write_bytes(b"")
    before = sorted(finished.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint to finish it from"):
        resume(finished, quiet=True)
    assert sorted(finished.rglob("*")) == before


def test_a_run_killed_while_it_finished_is_finished(finished):
    (finished / DIGESTS_FILE).unlink()
    (finished / "model.safetensors").write_bytes(b"")
    (finished / ".report.html.0123abcd").write_text("half a page")
    resume(finished, quiet=True)
    assert load(finished).num_patches == 16
    assert not list(finished.glob(".report*"))


def test_options_changed_under_a_run_are_refused(killed):
    text = (killed / "config.yaml").read_text()
    (killed / "config.yaml").write_text(text.replace("lr: 0.005\n", "lr: 0.003\n"))
    with pytest.raises(UserError, match=r"lr: 0.005 -> 0.003"):
        resume(killed, quiet=True)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("mask_tokens: encoder", "mask_tokens: decoder", "mask_tokens: encoder -> decoder"),
        ("norm_pix_loss: false", "norm_pix_loss: true", "norm_pix_loss: False -> True"),
        ("- 8\n- 8", "- 16\n- 16", r"image_size: \[8, 8\] -> \[16, 16\]"),
    ],
)
def test_options_of_the_model_changed_under_a_run_are_refused(killed, before, after, told):
    """As they are written now: the model itself comes from the checkpoint, and need not be that of the options."""
    text = (killed / "config.yaml").read_text()
    assert before in text
    (killed / "config.yaml").write_text(text.replace(before, after))
    with pytest.raises(UserError, match=rf"from the options that the run started with:\n  {told}\n"):
        resume(killed, quiet=True)


@pytest.mark.parametrize("change", ["names", "contents"])
def test_images_changed_under_a_run_are_refused_though_their_number_is_the_same(tmp_path, images, change):
    data = shutil.copytree(images, tmp_path / "data")
    killed_at(6, pretrain, data, out=tmp_path / "run", **SHORT)
    for path in sorted(data.iterdir())[:18]:
        noise(int(path.stem), 1).save(path)
        if change == "names":
            path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(UserError, match="The training images"):
        resume(tmp_path / "run", quiet=True)


def test_labels_changed_under_a_run_are_refused(tmp_path):
    train, val = ([(np.asarray(noise(n, i)), i % 2) for i in range(8)] for n in (0, 1))
    options = {**{key: value for key, value in SHORT.items() if key != "model_settings"}, "rand_augment": ""}

    def run():
        return finetune("crate_mae_nano_patch2_8", out=tmp_path / "run", **{**options, "train": train, "val": val})

    killed_at(2, run)
    train = [(image, 1 - label) for image, label in train]
    with pytest.raises(UserError, match="The training labels have changed since this run started"):
        run()


def test_weights_that_are_not_finite_take_no_good_checkpoints_place(killed, monkeypatch):
    usual = torch.optim.AdamW.step

    def broken(optimizer, *args, **options):
        usual(optimizer, *args, **options)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(DivergedError, match=r"good checkpoint is .*step-8"):
        resume(killed, quiet=True)
    assert newest_checkpoint(killed) == killed / "checkpoints" / "step-8"


def test_the_checkpoint_to_go_on_from_is_read_once_for_its_digests(killed, monkeypatch):
    read = []
    usual = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or usual(path))
    killed_at(9, resume, killed, quiet=True)
    weights = [path for path in read if path.name == "model.safetensors"]
    assert weights == [killed / "checkpoints" / "step-8" / "model.safetensors"]
