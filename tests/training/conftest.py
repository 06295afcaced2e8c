"""A model so small that a run takes a second, and runs of it on 297 of scikit-learn's digits."""

import dataclasses
import os
import signal

import pytest
import torch

from crate_mae.commands.train import finetune, pretrain
from crate_mae.data.dataset import default_generator_seeded
from crate_mae.models import create_model
from crate_mae.models.weights import save
from crate_mae.training.options import FinetuneOptions, PretrainOptions, RunOptions
from crate_mae.training.processes import STOPPING
from crate_mae.training.progress import Display
from crate_mae.training.report import RunReport
from tests.training.real_processes import CPU, Forked, launched

TINY_MODEL = {"embed_dim": 24, "num_heads": 2, "depth": 2, "decoder_depth": 2}
TINY_RUN = {
    "model_settings": TINY_MODEL,
    "steps": 20,
    "batch_size": 24,  # an epoch has 11 steps: 20 steps go from one to the next
    "lr": 5e-3,
    "precision": "float32",
    "workers": 0,
    "threads": 1,
    "trackers": (),
    "log_steps": 3,
    "monitor_steps": 10,
    "quiet": True,
}
TINY_FINETUNING = {
    **{key: value for key, value in TINY_RUN.items() if key != "model_settings"},
    "train": "digits:train",
    "val": "digits:test",
}


def at_step(monkeypatch, step, action) -> None:
    """Call `action` when a run has done `step` steps."""
    usual = Display.step

    def acting(display, done, *numbers):
        usual(display, done, *numbers)
        if done == step:
            action()

    monkeypatch.setattr(Display, "step", acting)


def weights(run) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def cpu(monkeypatch) -> None:
    """Tests compute on the CPU, also where there is something faster, and bit for bit."""
    if torch.accelerator.is_available():
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def written_report() -> None:
    """Asks for runs that write `report.html`; see `no_report`."""


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch) -> None:
    """Without `written_report`, runs write no report: it takes a third of the time of so short a run."""
    if "written_report" not in request.fixturenames:
        monkeypatch.setattr(RunReport, "_write", lambda _report: None)


@pytest.fixture
def config() -> PretrainOptions:
    """A configuration with something of every kind in it."""
    return PretrainOptions(
        data="Bilder/Käse",
        out="run",
        val=None,
        model="crate_mae_nano_patch2_8",
        model_settings={"threshold": 0.1, "depth": 2},
        image_size=(8, 10),
        channels=1,
        mean=(0.305,),
        std=(0.3758,),
        mask_ratio=0.75,
        mask_tokens="encoder",
        norm_pix_loss=False,
        drop_path=0.0,
        steps=39,
        batch_size=128,
        lr=1e-5,
        min_lr=0.0,
        warmup_epochs=1 / 3,
        weight_decay=0.05,
        clip_grad=1.0,
        min_crop=0.2,
        flip=True,
        seed=2**40,
        precision="float32",
        accumulation=1,
        compile=False,
        workers=1,
        threads=1,
        max_bad=0.01,
        checkpoint_minutes=10.0,
        checkpoint_epochs=3,
        log_steps=1,
        monitor_steps=2,
        trackers=(),
    )


@pytest.fixture
def finetune_config(config) -> FinetuneOptions:
    """A configuration of the other command."""
    shared = {option.name: getattr(config, option.name) for option in dataclasses.fields(RunOptions)}
    return FinetuneOptions(
        **shared,
        model=config.model,
        train="Bilder/Käse",
        val="Bilder/Brot",
        labels=0.1,
        pooling="cls+mean",
        layer_decay=0.75,
        mixup=0.8,
        cutmix=1.0,
        rand_augment="rand-m9",
        label_smoothing=0.1,
        ema=0.99,
    )


@pytest.fixture
def tiny_model():
    with default_generator_seeded(0):
        return create_model("crate_mae_nano_patch2_8", in_chans=1, **TINY_MODEL)


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run(name, **options)`: a run of 20 steps on few of the digits."""

    def run(name="run", data="digits:test", **options):
        return pretrain(data, out=tmp_path / name, **{**TINY_RUN, **options})

    return run


@pytest.fixture
def encoder_folder(tmp_path, tiny_model):
    """A folder with a model to fine-tune."""
    save(tiny_model, tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def tiny_finetuning(tmp_path, encoder_folder):
    """`tiny_finetuning(name, **options)`: 20 steps of fine-tuning on the digits."""

    def run(name="run", model=encoder_folder, **options):
        return finetune(model, out=tmp_path / name, **{**TINY_FINETUNING, **options})

    return run


@pytest.fixture
def usual_signals():
    """The handlers of a program in the foreground, also when the tests run in the background; all raise."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def driver():
    """`driver(*words)`: a real process that trains (driver.py); or one for each of `environments`; or by a launcher."""
    started = []

    def start(*words, launcher=None, environments=({},)):
        words = [str(word) for word in words]
        given = [{**os.environ, "OMP_NUM_THREADS": "1", **each} for each in environments]
        process = Forked(words, given) if launcher is None else launched(launcher, words, {**given[0], **CPU})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
