"""Processes of `driver.py`: how they are launched, waited for, and compared by what they leave behind."""

import json
from pathlib import Path

from safetensors.torch import load_file

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CPU = {"ACCELERATE_USE_CPU": "true"}
MONOTONE = "model_settings={embed_dim: 24, num_heads: 2, depth: 2, decoder_depth: 2, layer: monotone}"
_LAUNCH = ("-m", "accelerate.commands.launch", "--main_process_port=0")
_FSDP = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp.yaml"


def accelerate(processes):
    """Accelerate calls several processes with a CPU each "multi_gpu" too, and ACCELERATE_USE_CPU distinguishes them."""
    return (*_LAUNCH, "--multi_gpu", f"--num_processes={processes}")


def sharded(processes):
    return (*_LAUNCH, "--config_file", str(_FSDP), f"--num_processes={processes}")


def wait_for(process, line):
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"the process ended before it printed {line!r}")


def finish(process, code=0):
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == code, output
    return output


def largest_difference(first, second):
    first, second = (load_file(run / "model.safetensors") for run in (first, second))
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def world_size(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["world_size"]


def column(run, number):
    """A column of metrics.csv as text, from the row of step 0 on."""
    return [row.split(",")[number] for row in (run / "metrics.csv").read_text().splitlines()[1:]]
