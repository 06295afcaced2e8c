"""How fast a step is, beside the reference implementation, timm and transformers: `python -m benchmarks.steps --help`.

Two entries at a time take turns in a process of their own, A B A B, with a plain product of matrices after each
round, which says what the machine can do. A ratio is one of times in the same round.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.chart import draw_duels
from benchmarks.duels import DUELS, HEAD, Duel, fight
from benchmarks.entries import ENTRIES, Size, sizes
from benchmarks.report import command_line, common_options, heading, result_path
from benchmarks.worker import ask
from crate_mae.data.files import write_whole
from crate_mae.models.devices import fastest_device
from crate_mae.training.preflight import multiplies_in_bfloat16


class Memory(NamedTuple):
    """What training takes, entry by entry.

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
    options = _parser().parse_args(arguments)
    duels = list(_duels(options))
    memories = list(_memories(options)) if "training" in options.tasks else []
    command = command_line("benchmarks.steps", arguments)
    text = "\n".join([*heading("Steps", command, options), *_tables(duels, memories, options), ""])
    path = result_path("steps", options)
    write_whole(path, text.encode())
    draw_duels(duels, path.with_suffix(".png"))
    print(text)


def _parser() -> argparse.ArgumentParser:
    slow = fastest_device().type == "cpu" and not multiplies_in_bfloat16(torch.device("cpu"))
    precisions = ["float32"] if slow else ["float32", "bfloat16"]
    found = common_options(__doc__, rounds=9)
    found.add_argument("--sizes", nargs="+", choices=sizes(), default=["base", "micro"])
    found.add_argument("--batch", type=int, help="images a step; by default few, for a processor")
    found.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=precisions)
    found.add_argument("--tasks", nargs="+", choices=DUELS, default=list(DUELS))
    return found


def _size(name: str, options: argparse.Namespace) -> Size:
    size = sizes()[name]
    return dataclasses.replace(size, batch=options.batch or size.batch)


def _duels(options: argparse.Namespace) -> Iterator[Duel]:
    timing = {"rounds": options.rounds, "clock": options.clock, "threads": options.threads}
    for size, precision, task in itertools.product(options.sizes, options.precisions, options.tasks):
        for names in DUELS[task]:
            duel = fight(size, _size(size, options), precision, task, names, **timing)
            print(duel.row, file=sys.stderr, flush=True)
            yield duel


def _memories(options: argparse.Namespace) -> Iterator[Memory]:
    for size, precision in itertools.product(options.sizes, options.precisions):
        what = {"precision": precision, "task": "training", "threads": options.threads}
        memory = Memory(
            size, precision, {name: ask("memory", _size(size, options), name=name, **what) for name in ENTRIES}
        )
        print(_memory_row(memory), file=sys.stderr, flush=True)
        yield memory


def _tables(duels: Sequence[Duel], memories: Sequence[Memory], options: argparse.Namespace) -> Iterator[str]:
    batches = ", ".join(f"{size} {_size(size, options).batch}" for size in options.sizes)
    yield f"Images a step: {batches}.\n"
    yield "A ratio says how many times as long the second takes: median (quartiles) over rounds. Times are medians."
    yield "Operations are those of matrix products. The peak is the rate of one large product in the same rounds, in"
    yield "Gflop a second. All entries have the same optimizer, AdamW in one kernel.\n"
    yield HEAD
    yield from (duel.row for duel in duels)
    if memories:
        yield "\nPeak memory of training above the imports, each entry in a process of its own: MB (as a share of"
        yield "the reference implementation's), and page faults of a step after the first three.\n"
        yield f"| size | precision | {' | '.join(ENTRIES)} |"
        yield "|---" * (2 + len(ENTRIES)) + "|"
        yield from map(_memory_row, memories)


def _memory_row(memory: Memory) -> str:
    whole = memory.found["reference"]["peak"]
    cells = [
        f"{found['peak'] / 1e6:,.0f} ({found['peak'] / whole:.2f}), {found['faults']:,.0f}"
        for found in memory.found.values()
    ]
    return f"| {memory.size} | {memory.precision} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
