"""The SLURM script, with stand-ins for SLURM: what it launches on which machine, and a real run that its time ends."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from crate_mae.models.checkpoints import newest_checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "pretrain.sh"

# As SLURM does: the same command on every machine, each with its number; it ends when all have.
SRUN = """#!/bin/bash
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
wait
"""
SCONTROL = """#!/bin/bash
echo "$@" >&2
printf '127.0.0.1\\nelsewhere\\n'
"""


@pytest.fixture
def sbatch(tmp_path):
    """`sbatch(*words, **environment)`: the script on two machines with a GPU each, which are both this one."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    started = []

    def start(*words, accelerate=None, **environment):
        if accelerate is not None:
            (programs / "accelerate").write_text(accelerate)
            (programs / "accelerate").chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        given = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "gpu[3-4]", "PATH": path}
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, words)],
            env={**os.environ, **given, **environment},
            cwd=SCRIPT.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for each in everything_of(process):
            each.kill()
        process.communicate()


def everything_of(process):
    """A process and whatever it has started, and so on."""
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def test_each_machine_launches_its_processes_with_its_own_number(sbatch):
    say = """#!/bin/bash
words=$(printf '%q ' "$@" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$SRUN_CPUS_PER_TASK")
echo "$words"  # in one piece, beside the other machine
"""
    words = ("my images", "runs/a b", "--epochs", "800", "--recipe", "$HOME")
    output, _ = sbatch(*words, accelerate=say, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="64").communicate(
        timeout=600
    )
    asked, *launched = output.splitlines()
    assert asked == "show hostnames gpu[3-4]"
    assert sorted(map(shlex.split, launched)) == [
        [
            *("launch", "--config_file", "examples/accelerate/ddp.yaml", "--num_machines", "2"),
            *("--num_processes", "16", "--main_process_ip", "127.0.0.1", "--main_process_port", "29500"),
            *("--machine_rank", str(machine), "-m", "crate_mae", "pretrain", "my images", "--out", "runs/a b"),
            *("--epochs", "800", "--recipe", "$HOME", "270", "64"),
        ]
        for machine in (0, 1)
    ]


def test_without_a_folder_the_script_explains_its_use(sbatch):
    process = sbatch("images")
    assert process.communicate(timeout=600)[0].startswith("usage: sbatch ")
    assert process.returncode == 2


def test_a_run_on_two_machines_saves_itself_when_its_time_is_over(sbatch, tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    options = (
        "--steps=1000000",
        "--batch-size=64",
        "--log-steps=1",
        "--precision=float32",
        "--workers=0",
        "--threads=1",
    )
    run = tmp_path / "run"
    process = sbatch("digits", run, *options, "--no-trackers", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    deadline = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < deadline and not (run / "metrics.csv").exists():
        time.sleep(0.1)
    assert (run / "metrics.csv").exists(), process.poll()
    for each in everything_of(process):  # as SLURM does, before it kills them
        if each.name() not in ("bash", "srun", "pretrain.sh"):
            each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert output.count("Stopped and saved at step") == 1, output
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())
    assert state["world_size"] == 2
    assert state["step"] > 0
    with FileLock(run / ".lock", timeout=0):  # which ended with the processes
        pass
