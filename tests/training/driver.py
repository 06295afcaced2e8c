"""A process that trains, for tests that kill one or launch several.

driver.py pretrain OUT KEY=VALUE... | driver.py finetune OUT model=MODEL KEY=VALUE... | driver.py resume OUT

It prints "step N" after every step, and then sleeps for `pause` seconds. With `stop_at=N` it is sent SIGTERM after
step N; with `die_at=N` the second process is killed there. See real_processes.py for how it is started.
"""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import yaml

from crate_mae.commands.train import finetune, pretrain, resume
from crate_mae.errors import RunStopped, UserError
from crate_mae.training import progress, report, start

TINY_RUN = {
    "model_settings": {"embed_dim": 24, "num_heads": 2, "depth": 2, "decoder_depth": 2},
    "steps": 20,
    "batch_size": 24,
    "lr": 5e-3,
    "precision": "float32",  # "auto" takes the faster one, which may be another in the next process
    "workers": 0,
    "threads": 1,
    "trackers": (),
    "log_steps": 3,
    "monitor_steps": 10,
}


def main(command, out, *words):
    options = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words)}
    pause, stop_at, die_at = (options.pop(key, None) for key in ("pause", "stop_at", "die_at"))
    progress.Display.step = partial(print_step, pause or 0.0, stop_at, die_at)
    report.RunReport._write = lambda _report: None  # a page would take a third of the time of so short a run
    compile_with = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **how: compile_with(module, backend="eager", **how)  # needs no compiler
    start.check_compiler = lambda *_: None
    try:
        train(command, Path(out), options)
    except RunStopped as stopped:
        sys.exit(128 + stopped.signal)
    except UserError as error:
        sys.stdout.write(f"Error: {error}\n")
        sys.exit(2)


def train(command, out, options):
    if command == "resume":
        resume(out, quiet=True)
    elif command == "finetune":
        shared = {key: value for key, value in TINY_RUN.items() if key != "model_settings"}
        labelled = {"train": "digits:train", "val": "digits:test"}
        finetune(options.pop("model"), out=out, quiet=False, **{**shared, **labelled, **options})
    else:
        pretrain(options.pop("data", "digits:test"), out=out, quiet=False, **{**TINY_RUN, **options})


def print_step(pause, stop_at, die_at, step, *_numbers):
    sys.stdout.write(f"step {step}\n")
    sys.stdout.flush()
    if step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    if step == die_at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause)


def forked(output, environment, *words):
    """`main` in a process that was forked with everything imported, and prints to a connection."""
    multiprocessing.set_start_method(None, force=True)  # loaders start as they do elsewhere
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    main(*words)


if __name__ == "__main__":
    main(*sys.argv[1:])
