"""Real processes, killed at any point and resumed."""

import random
import re
import signal

import pytest
from filelock import FileLock

from tests.training.real_processes import MONOTONE, finish, largest_difference, wait_for

CHECKPOINT_OFTEN = ("checkpoint_minutes=0.0001",)
KILLS = ((1, 5), (8, 12))  # each at a random step of a range


def result(run):
    rows = [row.split(",")[:9] for row in (run / "metrics.csv").read_text().splitlines()]
    return (run / "model.safetensors").read_bytes(), rows, (run / "layers.csv").read_text()


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (("drop_path=0.2",), KILLS[:1]),
        ((MONOTONE, "precision=bfloat16", "workers=1"), KILLS[1:2]),
    ],
    ids=["published layers", "monotone layers in bfloat16"],
)
def test_a_run_killed_at_random_points_ends_with_the_same_bits(tmp_path, driver, options, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = driver("pretrain", whole, *options)
    chance = random.Random(0)
    command = "pretrain"
    for first, last in kills:
        process = driver(command, killed, *options, *CHECKPOINT_OFTEN, "pause=0.02")
        wait_for(process, f"step {chance.randint(first, last)}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = "resume"
    finish(driver("resume", killed))
    assert re.search(r"resuming +at step [1-9]", (killed / "log.txt").read_text())  # not from the beginning
    finish(uninterrupted)
    assert result(killed) == result(whole)


def test_a_killed_run_of_fine_tuning_ends_with_the_same_bits(tmp_path, driver, encoder_folder):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (f"model={encoder_folder}", "drop_path=0.2", "labels=0.1", "monitor_steps=4", "workers=1")
    uninterrupted = driver("finetune", whole, *options)
    chance = random.Random(1)
    command = "finetune"
    for first, last in KILLS[1:2]:
        process = driver(command, killed, *options, *CHECKPOINT_OFTEN, "pause=0.02")
        wait_for(process, f"step {chance.randint(first, last)}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = "resume"
    finish(driver("resume", killed))
    assert re.search(r"resuming +at step [1-9]", (killed / "log.txt").read_text())  # not from the beginning
    finish(uninterrupted)
    ends = [line.split("End: ")[1] for line in (killed / "log.txt").read_text().splitlines() if "End: " in line]
    assert ends == ["unknown: the process before this one was killed, or its machine stopped.", "finished."]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    last = [(run / "checkpoints" / "step-20" / "trained.safetensors").read_bytes() for run in (killed, whole)]
    assert last[0] == last[1]
    rows = [[row.split(",")[:11] for row in (run / "metrics.csv").read_text().splitlines()] for run in (killed, whole)]
    assert rows[0] == rows[1]
    assert rows[0][0][-1] == "best_score"


def test_a_real_sigterm_ends_with_143_and_the_command_to_go_on(tmp_path, driver):
    process = driver("pretrain", tmp_path / "run", "workers=1", "pause=0.05")
    wait_for(process, "step 4")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"crate-mae resume {tmp_path / 'run'}" in output
    with FileLock(tmp_path / "run" / ".lock", timeout=0):  # which ended with the process
        pass


def test_a_compiled_model_has_the_names_and_nearly_the_weights_of_a_plain_one(tmp_path, driver):
    plain = driver("pretrain", tmp_path / "plain", "steps=4")
    finish(driver("pretrain", tmp_path / "compiled", "steps=4", "compile=true"))
    finish(plain)
    assert largest_difference(tmp_path / "plain", tmp_path / "compiled") < 1e-5
