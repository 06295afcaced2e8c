"""A run on a GPU: where a step waits for the device, and that a run that was stopped ends with the same bits."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import crate_mae
from crate_mae.training import loop

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM_UP = 6, 2  # in the first steps the optimizer and the libraries take their memory
RUN = {
    "model_settings": {"embed_dim": 24, "num_heads": 2, "depth": 2, "decoder_depth": 2},
    "steps": STEPS,
    "batch_size": 24,
    "workers": 0,
    "threads": 1,
    "trackers": (),
    "monitor_steps": 100,
    "quiet": True,
}


@contextmanager
def waiting(device, mode):
    """CUDA's answer to a wait for the device in the block: "error", or "default" for none."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "crate_mae_nano_monotone_patch2_8"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_waits_only_where_processes_agree_and_where_subspaces_are_retracted(
    device, name, precision, tmp_path, monkeypatch
):
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    steps, allowed = [], []
    usual = {each: getattr(loop, each) for each in ("training_step", "agree", "retract_")}

    def training_step(task, accelerator, *arguments, **options):
        assert accelerator.device.type == device.type
        steps.append(accelerator.device)
        with waiting(device, "error" if len(steps) > WARM_UP else "default"):
            return usual["training_step"](task, accelerator, *arguments, **options)

    def may_wait(each):
        def call(*arguments, **options):
            allowed.append(each)
            with waiting(device, "default"):
                return usual[each](*arguments, **options)

        return call

    monkeypatch.setattr(loop, "training_step", training_step)
    for each in ("agree", "retract_"):
        monkeypatch.setattr(loop, each, may_wait(each))
    crate_mae.pretrain("digits:test", out=tmp_path / "run", model=name, precision=precision, **RUN)
    assert len(steps) == STEPS
    assert allowed == ["agree", "retract_"] * STEPS
    if device.type == "cpu":
        pytest.skip("the run has passed; whether a step waits for the device, only CUDA can tell")


# The driver of the tests of runs, with operations that give the same bits each time. A stopped run ends with 143, and a
# second process resumes it.
OPTIONS = ("model=crate_mae_nano_monotone_patch2_8", "monitor_steps=100")
DETERMINISTIC = f"""
import sys
import torch
from tests.training.driver import main

torch.use_deterministic_algorithms(True, warn_only=True)
runs, is_second = sys.argv[1], sys.argv[2] == "second"
for precision in ("float32", "bfloat16"):
    options = {OPTIONS} + (f"precision={{precision}}",)
    if is_second:
        main("resume", f"{{runs}}/stopped-{{precision}}")
        continue
    main("pretrain", f"{{runs}}/whole-{{precision}}", *options)
    try:
        main("pretrain", f"{{runs}}/stopped-{{precision}}", *options, "stop_at=7")
    except SystemExit as stopped:
        assert stopped.code == 143
    else:
        raise AssertionError("the run was not stopped")
"""


def test_a_run_that_was_stopped_ends_with_the_same_bits(device, tmp_path):
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    for process in ("first", "second"):
        command = [sys.executable, "-c", DETERMINISTIC, str(tmp_path), process]
        environment = {**os.environ, **settings}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    for precision in ("float32", "bfloat16"):
        whole, stopped = ((tmp_path / f"{run}-{precision}" / "model.safetensors") for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), precision
