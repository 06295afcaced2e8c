"""How fast a step is, beside the textbook form, timm and transformers: `python -m benchmarks.steps --help`.

Two contestants at a time take turns in a process of their own, A B A B, with a plain product of matrices after each
round, which says what the machine can do. A ratio is one of times in the same round.
"""

import argparse
import datetime
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.chart import draw_duels
from benchmarks.contestants import CONTESTANTS, sizes
from benchmarks.duels import DUELS, HEAD, Duel, fight
from benchmarks.worker import CLOCKS, ask
from crate_mae.data.files import write_whole
from crate_mae.models.devices import fastest_device
from crate_mae.training.precision import multiplies_in_bfloat16

RESULTS = Path(__file__).parent / "results"


class Memory(NamedTuple):
    """What training takes, contestant by contestant.

    Attributes:
        size: of all.
        precision: of all.
        found: `peak` bytes and `faults` a step, of each.
    """

    size: str
    precision: str
    found: dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table and a chart."""
    options = parser().parse_args(arguments)
    duels = list(_duels(options))
    memories = list(_memories(options)) if "training" in options.tasks else []
    command = " ".join(["python -m benchmarks.steps", *(sys.argv[1:] if arguments is None else arguments)])
    text = "\n".join([*heading("Steps", command, options), *_tables(duels, memories), ""])
    path = options.out / f"steps_{options.machine}_{datetime.date.today()}.md"
    write_whole(path, text.encode())
    draw_duels(duels, path.with_suffix(".png"))
    print(text)


def parser() -> argparse.ArgumentParser:
    """Of the options on the command line."""
    slow = fastest_device().type == "cpu" and not multiplies_in_bfloat16(torch.device("cpu"))
    precisions = ["float32"] if slow else ["float32", "bfloat16"]
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--machine", required=True, help="its name in the results")
    found.add_argument("--sizes", nargs="+", choices=sizes(), default=["base", "micro"])
    found.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=precisions)
    found.add_argument("--tasks", nargs="+", choices=DUELS, default=list(DUELS))
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, beside other work")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder")
    return found


def heading(title: str, command: str, options: argparse.Namespace) -> Iterator[str]:
    """What it takes to measure the same again."""
    yield f"# {title} on {options.machine}, {datetime.date.today()}"
    yield f"\n    {command}\n"
    device = fastest_device()
    hardware = _processor() if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}, {_processor()}"
    yield (
        f"{hardware}, {options.threads} thread(s), {options.clock} clock, PyTorch {torch.__version__}, "
        f"{options.rounds} rounds, seed 0."
    )


def _duels(options: argparse.Namespace) -> Iterator[Duel]:
    timing = {"rounds": options.rounds, "clock": options.clock, "threads": options.threads}
    for size, precision, task in itertools.product(options.sizes, options.precisions, options.tasks):
        for names in DUELS[task]:
            duel = fight(size, precision, task, names, **timing)
            print(duel.row, file=sys.stderr, flush=True)
            yield duel


def _memories(options: argparse.Namespace) -> Iterator[Memory]:
    for size, precision in itertools.product(options.sizes, options.precisions):
        what = {"size": size, "precision": precision, "task": "training", "threads": options.threads}
        yield Memory(size, precision, {name: ask("memory", name=name, **what) for name in CONTESTANTS})


def _tables(duels: Sequence[Duel], memories: Sequence[Memory]) -> Iterator[str]:
    batches = ", ".join(f"{size} {sizes()[size].batch}" for size in dict.fromkeys(duel.size for duel in duels))
    yield f"Images a step: {batches}.\n"
    yield "A ratio says how many times as long the second takes: median (quartiles) over rounds. Times are medians."
    yield "Operations are those of matrix products. The peak is the rate of one large product in the same rounds.\n"
    yield HEAD
    yield from (duel.row for duel in duels)
    if memories:
        yield "\nPeak memory of training above the imports, each contestant in a process of its own: MB (as a share of"
        yield "the textbook's), and page faults of a step after the first three.\n"
        yield f"| size | precision | {' | '.join(CONTESTANTS)} |"
        yield "|---" * (2 + len(CONTESTANTS)) + "|"
        yield from map(_memory_row, memories)


def _memory_row(memory: Memory) -> str:
    whole = memory.found["textbook"]["peak"]
    cells = [
        f"{found['peak'] / 1e6:,.0f} ({found['peak'] / whole:.2f}), {found['faults']:,.0f}"
        for found in memory.found.values()
    ]
    return f"| {memory.size} | {memory.precision} | {' | '.join(cells)} |"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
