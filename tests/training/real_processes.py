"""Processes of `driver.py`: how they are launched, waited for, and compared by what they leave behind."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.training.driver import forked

DRIVER = Path(__file__).with_name("driver.py")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CPU = {"ACCELERATE_USE_CPU": "true"}
MONOTONE = "model_settings={embed_dim: 24, num_heads: 2, depth: 2, decoder_depth: 2, layer: monotone}"
_CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"


def sharded(processes):
    """The environments of processes that share one model; for `Forked`."""
    return _environments(processes, "fsdp.yaml")


def unsharded(processes):
    """The environments of processes with a whole model each; for `Forked`.

    Accelerate calls several processes with a CPU each "multi_gpu" too, and ACCELERATE_USE_CPU distinguishes them.
    """
    return _environments(processes, "ddp.yaml")


def _environments(processes, file):
    """What `accelerate launch` with one of our configuration files sets for each of its processes."""
    words = ["--config_file", str(_CONFIGURATIONS / file), f"--num_processes={processes}", "--main_process_port=0", "-"]
    words, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    shared = {**prepare_multi_gpu_env(words), **CPU}
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(words.main_process_port), "WORLD_SIZE": str(processes)}
    return [{**shared, **given, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def launched(launcher, words, environment):
    """A process that starts from nothing, by a launcher or alone."""
    command = [sys.executable, *launcher, str(DRIVER), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


class Forked:
    """Processes forked from one that has everything imported, which takes longer than most of what is tested.

    They share one output. What is used of `subprocess.Popen` is here too.
    """

    def __init__(self, words, environments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([forked.__module__])
        reader, writer = context.Pipe(duplex=False)
        self._all = [context.Process(target=forked, args=(writer, each, *words)) for each in environments]
        for each in self._all:
            each.start()
        writer.close()
        self._reader = reader
        self.stdout = open(reader.fileno(), closefd=False)  # noqa: SIM115  # closed with the connection

    @property
    def returncode(self):
        """Of the first that failed; negative where a signal ended it."""
        codes = [each.exitcode for each in self._all]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        for each in self._all:
            os.kill(each.pid, number)

    def kill(self):
        for each in self._all:
            each.kill()

    def wait(self, timeout=None):
        for each in self._all:
            each.join(timeout)
            assert each.exitcode is not None, "a process did not end"

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.stdout.read(), None


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
