"""One measurement in a process of its own: `python -m benchmarks.worker`, a question in JSON in, an answer out.

Entries are timed two at a time: with many models in one process memory is scattered, and all look slower.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.entries import ENTRIES, Entry, Size, sizes
from crate_mae.costs.trial import flop_counter
from crate_mae.models.devices import fastest_device
from crate_mae.training.preflight import autocast, peak_memory, restart_peak

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_SETTLING_STEPS = 3  # in which the optimizer, and the C library's heap, take what they keep
_COUNTED_STEPS = 2


def ask(kind: str, size: Size, **question: Any) -> Any:
    """Have a question answered in a new process: `kind` names a function of this file, the rest are its arguments."""
    answer = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({"kind": kind, "size": size.to_dict(), **question}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(answer.stdout)


def times(
    device: torch.device, names: list[str], size: Size, precision: str, task: str, rounds: int, clock: str
) -> dict[str, Any]:
    """Seconds of each entry in each round, operations of each, and the rate of a plain product in each round."""
    works = {name: work(device, name, size, precision, task) for name in names}
    for turn in works.values():
        turn()  # before anything is counted: what is formed once and kept is no part of later turns
    flops = {name: _count(turn) for name, turn in works.items()}
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for _ in range(rounds):
        for name, turn in works.items():
            seconds[name].append(_seconds(turn, device, clock))
        rates.append(_product_rate(device, precision, clock))
    return {"seconds": seconds, "flops": flops, "rates": rates}


def memory(device: torch.device, name: str, size: Size, precision: str, task: str) -> dict[str, float]:
    """Bytes at the peak of some steps above what the imports took, page faults of each later step, and parameters."""
    work(device, name, sizes()["nano"], precision, task)()  # imports what is imported at the first step only
    before = restart_peak()
    entry = _enter(device, name, size, precision)
    turn = _WORK[task](entry, device, precision)
    for _ in range(_SETTLING_STEPS):
        turn()
    faults = _page_faults()
    for _ in range(_COUNTED_STEPS):
        turn()
    faults = (_page_faults() - faults) / _COUNTED_STEPS
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        after = peak_memory()
        assert before is not None
        assert after is not None
        peak = after - before
    return {"peak": peak, "faults": faults, "parameters": sum(p.numel() for p in entry.model.parameters())}


def costs(device: torch.device, name: str, size: Size, precision: str, rounds: int, clock: str) -> dict[str, Any]:
    """Both, of one entry's training."""
    weighed = memory(device, name, size, precision, "training")
    return weighed | times(device, [name], size, precision, "training", rounds, clock)


def work(device: torch.device, name: str, size: Size, precision: str, task: str) -> Callable[[], object]:
    """A training step, or the encoding of a batch."""
    return _WORK[task](_enter(device, name, size, precision), device, precision)


def _enter(device: torch.device, name: str, size: Size, precision: str) -> Entry:
    with autocast(device, precision):  # so that it can see how it will be asked to compute
        return ENTRIES[name](size, device)


def _training(entry: Entry, device: torch.device, precision: str) -> Callable[[], object]:
    entry.model.train()
    optimizer = entry.optimizer()

    def step() -> None:
        with autocast(device, precision):
            loss = entry.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _encoding(entry: Entry, device: torch.device, precision: str) -> Callable[[], object]:
    entry.model.eval()

    def encode() -> None:
        with torch.inference_mode(), autocast(device, precision):
            entry.encode()

    return encode


_WORK = {"training": _training, "encoding": _encoding}


def _count(turn: Callable[[], object]) -> int:
    with flop_counter() as counter:
        turn()
    return counter.get_total_flops()


def _seconds(turn: Callable[[], object], device: torch.device, clock: str) -> float:
    now = CLOCKS[clock]
    started = now()
    turn()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return now() - started


def _product_rate(device: torch.device, precision: str, clock: str) -> float:
    """Operations a second of a product of two large matrices, the best of some: what the machine can do."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, dtype=getattr(torch, precision), device=device)
    return 2 * side**3 / min(_seconds(lambda: a @ a, device, clock) for _ in range(5))


def _page_faults() -> int:
    """Pages that the system has brought in for this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _main() -> None:
    question: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(question.pop("threads"))
    question["size"] = Size.from_dict(question["size"])
    answer = {"times": times, "memory": memory, "costs": costs}[question.pop("kind")](fastest_device(), **question)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
