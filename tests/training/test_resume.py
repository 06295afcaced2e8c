"""Real processes: killed at any point and resumed, or several that train together."""

import json
import random
import signal

import pytest
from safetensors.torch import load_file

CHECKPOINT_OFTEN = ("checkpoint_minutes=0.0001",)


def wait_for(process, line):
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"the process ended before it said {line!r}")


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def result(run):
    rows = [row.split(",")[:9] for row in (run / "metrics.csv").read_text().splitlines()]
    return (run / "model.safetensors").read_bytes(), rows, (run / "layers.csv").read_text()


def largest_difference(first, second):
    first, second = (load_file(run / "model.safetensors") for run in (first, second))
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.parametrize("options", [("drop_path=0.2",), ("precision=bfloat16", "workers=1")])
def test_a_run_killed_at_random_points_ends_with_the_same_bits(tmp_path, driver, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = driver("pretrain", whole, *options)
    chance = random.Random(0)
    command = "pretrain"
    for first, last in ((1, 5), (8, 12), (15, 18)):
        process = driver(command, killed, *options, *CHECKPOINT_OFTEN, "pause=0.02")
        wait_for(process, f"step {chance.randint(first, last)}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = "resume"
    finish(driver("resume", killed))
    finish(uninterrupted)
    assert result(killed) == result(whole)


def test_a_killed_run_of_fine_tuning_ends_with_the_same_bits(tmp_path, driver, encoder_folder):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (f"model={encoder_folder}", "drop_path=0.2", "labels=0.5", "monitor_steps=4", "workers=1")
    uninterrupted = driver("finetune", whole, *options)
    chance = random.Random(1)
    command = "finetune"
    for first, last in ((3, 6), (12, 18)):
        process = driver(command, killed, *options, *CHECKPOINT_OFTEN, "pause=0.02")
        wait_for(process, f"step {chance.randint(first, last)}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = "resume"
    finish(driver("resume", killed))
    finish(uninterrupted)
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
    assert not (tmp_path / "run" / "lock").exists()


def test_a_compiled_model_has_the_names_and_nearly_the_weights_of_a_plain_one(tmp_path, driver):
    plain = driver("pretrain", tmp_path / "plain", "steps=4")
    finish(driver("pretrain", tmp_path / "compiled", "steps=4", "compile=true"))
    finish(plain)
    assert largest_difference(tmp_path / "plain", tmp_path / "compiled") < 1e-5


# Accelerate calls four processes with a CPU each "multi_gpu" too, and ACCELERATE_USE_CPU says which.
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=4", "--main_process_port=0"),
}


@pytest.mark.parametrize(("launcher", "number"), [("torchrun", 2), ("accelerate", 4)])
def test_several_processes_give_the_weights_of_one(tmp_path, driver, launcher, number):
    options = ("steps=12",)
    one = driver("pretrain", tmp_path / "one", *options)
    several = driver(
        "pretrain", tmp_path / "several", *options, launcher=LAUNCHERS[launcher], ACCELERATE_USE_CPU="true"
    )
    finish(several)
    finish(one)
    processes = [
        json.loads((tmp_path / name / "checkpoints" / "step-12" / "state.json").read_text())["world_size"]
        for name in ("one", "several")
    ]
    assert processes == [1, number]
    assert largest_difference(tmp_path / "one", tmp_path / "several") < 1e-5
    steps, losses = zip(*((row[0], row[2]) for row in result(tmp_path / "one")[1][2:]), strict=True)
    also_steps, also_losses = zip(*((row[0], row[2]) for row in result(tmp_path / "several")[1][2:]), strict=True)
    assert steps == also_steps
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in also_losses], abs=1e-5)


def test_two_processes_fine_tune_as_one(tmp_path, driver, encoder_folder):
    options = (f"model={encoder_folder}", "steps=8", "monitor_steps=4", "drop_path=0.0")
    one = driver("finetune", tmp_path / "one", *options)
    two = driver("finetune", tmp_path / "two", *options, launcher=LAUNCHERS["torchrun"], ACCELERATE_USE_CPU="true")
    finish(two)
    finish(one)
    assert json.loads((tmp_path / "two" / "checkpoints" / "step-8" / "state.json").read_text())["world_size"] == 2
    assert largest_difference(*(tmp_path / name / "checkpoints" / "step-8" for name in ("one", "two"))) < 1e-5
    accuracies = [
        [row.split(",")[8] for row in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert accuracies[0] == accuracies[1]
