"""How well training spreads: N processes of one thread against one process of N threads, with the same batches.

    python -m benchmarks.scaling --machine NAME

All take real steps of the training loop on images in memory, in turns A B A B; whoever waits for its turn reads from a
pipe. It is for processors, whose threads one process can use as well as several.
"""

import argparse
import contextlib
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment

from benchmarks.entries import sizes
from benchmarks.report import RESULTS, heading
from crate_mae.data import Batch
from crate_mae.data.files import write_whole
from crate_mae.training.loop import training_step
from crate_mae.training.model_state import build_model_state
from crate_mae.training.options import PretrainOptions
from crate_mae.training.resolve import resolve

_SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Team(NamedTuple):
    """Processes that train one model together.

    Attributes:
        name: in the table.
        members: one process each, which reads numbers of steps and answers with seconds.
    """

    name: str
    members: list[subprocess.Popen[str]]

    def seconds(self, steps: int) -> float:
        """Of a step, as the slowest member has it."""
        with contextlib.suppress(BrokenPipeError):  # then an answer is missing
            for member in self.members:
                _pipe(member.stdin).write(f"{steps}\n")
                _pipe(member.stdin).flush()
        answers = [_pipe(member.stdout).readline() for member in self.members]
        if not all(answers):
            raise RuntimeError(f"A process of {self.name} has ended; what it said is above.")
        return max(float(answer) for answer in answers) / steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table."""
    options = _parser().parse_args(arguments)
    rows = [row for size in options.sizes for row in _rows(size, options)]
    command = " ".join(["python -m benchmarks.scaling", *(sys.argv[1:] if arguments is None else arguments)])
    head = "| size | images a step | processes x threads | ms a step | efficiency |\n" + "|---" * 5 + "|"
    said = (
        f"Efficiency is the time of one process of {options.threads} threads by that of the processes in the row, in "
        f"the same round: median (quartiles). A turn is {options.steps} step(s). float32.\n"
    )
    text = "\n".join([*heading("Processes against threads", command, options), said, head, *rows, ""])
    write_whole(options.out / f"scaling_{options.machine}_{datetime.date.today()}.md", text.encode())
    print(text)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--machine", required=True, help="its name in the results")
    found.add_argument("--sizes", nargs="+", choices=sizes(), default=["base", "micro"])
    found.add_argument("--threads", type=int, default=2, help="in all")
    found.add_argument("--sharded", action="store_true", help="also processes that share one model (FSDP2)")
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--steps", type=int, default=3, help="of a turn")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder")
    found.set_defaults(clock="wall")
    return found


def _rows(size: str, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table for one size, the first of them the one that the others are held against."""
    n = options.threads
    teams = [("1 x " + str(n), 1, n, {}), (f"{n} x 1", n, 1, {}), (f"{n} x 1, sharded", n, 1, _SHARDED)]
    with contextlib.ExitStack() as stack:
        playing = [
            stack.enter_context(_team(name, size, processes, threads, environment))
            for name, processes, threads, environment in teams[: 3 if options.sharded else 2]
        ]
        for team in playing:
            team.seconds(options.steps)
        rounds = [[team.seconds(options.steps) for team in playing] for _ in range(options.rounds)]
    for team, seconds in zip(playing, zip(*rounds, strict=True), strict=True):
        ratios = [times[0] / own for times, own in zip(rounds, seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        yield (
            f"| {size} | {sizes()[size].batch} | {team.name} | {1000 * statistics.median(seconds):,.1f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) |"
        )


@contextlib.contextmanager
def _team(name: str, size: str, processes: int, threads: int, environment: dict[str, str]) -> Iterator[Team]:
    """Start a team; end it when the block is left."""
    shared = {**os.environ, **environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    members: list[subprocess.Popen[str]] = []
    try:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            command = [sys.executable, "-c", "from benchmarks.scaling import member; member()"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            member = subprocess.Popen(command, env=shared | own, cwd=Path(__file__).parents[1], **pipes)
            members.append(member)
            _pipe(member.stdin).write(json.dumps({"size": size, "threads": threads}) + "\n")
        yield Team(name, members)
    finally:
        for member in members:
            member.kill()
            member.communicate()


def member() -> None:
    """A process of a team: take as many steps as each line of the input says, and answer with the seconds."""
    question = json.loads(sys.stdin.readline())
    torch.set_num_threads(question["threads"])
    size = sizes()[question["size"]]
    with patch_environment(accelerate_use_fsdp="false"):  # as the training loop does it
        accelerator = Accelerator(cpu=True)
    images = torch.zeros(size.ours.in_chans, *size.ours.image_size)
    options = PretrainOptions(
        [images] * (2 * size.batch),
        out="",
        model=size.ours.name,
        batch_size=size.batch,
        steps=10**6,
        precision="float32",
        threads=question["threads"],
        workers=0,
        trackers=(),
    )
    config, build_task = resolve(options, accelerator.num_processes, None)
    task = build_task(config)
    model_state = build_model_state(task, accelerator)
    share = size.batch // accelerator.num_processes
    generator = torch.Generator().manual_seed(accelerator.process_index)
    pixels = torch.randn(share, *images.shape, generator=generator)
    batches = repeat(Batch(pixels, torch.zeros(share, dtype=torch.int64), torch.arange(share), ()))
    step = 0
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            training_step(task, accelerator, model_state, batches, step, stop=0, save=False)
            step += 1
        sys.stdout.write(f"{time.perf_counter() - started}\n")
        sys.stdout.flush()


def _pipe(pipe: Any) -> Any:
    assert pipe is not None
    return pipe


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


if __name__ == "__main__":
    main()
