"""Give the library thousands of damaged and odd inputs: `python -m tests.faults.fuzz --minutes 5`. Not part of CI.

Each module in `tests/faults/kinds` has a list `KINDS`. An input of a kind is made by a seed in an empty folder, and
goes through the calls of its kind in a process of its own, which is killed if it hangs. An input is handled if each
call returns or raises a sentence (`UserError`, `UnreadableImage`). Any other exception, a hang, the death of the
process, or a gigabyte of memory is a fault; it is printed with what reproduces it, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

OUTCOMES = ("accepted", "sentence", "traceback", "memory", "hang", "died")
FAULTS = OUTCOMES[2:]
_SECONDS = 60  # for one input, on a machine that may be busy
_MOST_MIB = 1024  # that one input may add to the peak of memory
_ADDRESS_SPACE = 12 * 2**30  # protects the machine
_SHOWN = 5  # faults of a kind


class Kind(NamedTuple):
    """A kind of input: its name, how a seed makes one in an empty folder, and the calls that it goes through."""

    name: str
    make: Callable[[random.Random, Path], Any]
    calls: tuple[Callable[[Any], object], ...]


class Result(NamedTuple):
    """What became of an input; `detail` is a sentence, or the end of a traceback."""

    outcome: str
    detail: str = ""


def all_kinds() -> list[Kind]:
    """The kinds of every module in `tests/faults/kinds`."""
    package = importlib.import_module("tests.faults.kinds")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [kind for name in names for kind in importlib.import_module(f"tests.faults.kinds.{name}").KINDS]


def attempt(kind: Kind, seed: int) -> Result:
    """Make one input, and put it through the calls of its kind in this process; return the worst result."""
    from crate_mae.data import UnreadableImage
    from crate_mae.errors import UserError

    results = []
    with _temporary_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = kind.make(random.Random(f"{kind.name} {seed}"), folder)
        for call in kind.calls:
            try:
                call(given)
                results.append(Result("accepted"))
            except (UserError, UnreadableImage) as error:
                results.append(Result("sentence", str(error)))
            except BaseException as error:
                results.append(Result("traceback", _end_of(error)))
    return max(results, key=lambda result: OUTCOMES.index(result.outcome))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="fuzz-")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["rm", "-rf", folder], check=False)  # Python's own way ends at a thousand levels


def _end_of(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"


def _serve(kinds: list[Kind], requests: Any) -> None:
    """Put inputs through their calls until there are no more, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        while (request := requests.recv()) is not None:
            before = _peak_mib()
            result = attempt(kinds[request[0]], request[1])
            grown = _peak_mib() - before
            requests.send(Result("memory", f"{grown:,.0f} MiB") if grown > _MOST_MIB else result)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Worker:
    """A process for inputs, replaced by another when it hangs or dies."""

    def __init__(self, kinds: list[Kind]) -> None:
        self._kinds = kinds
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._kinds, other), daemon=True)
        self._process.start()
        other.close()

    def attempt(self, number: int, seed: int) -> Result:
        self._pipe.send((number, seed))
        if not self._pipe.poll(_SECONDS):
            result = Result("hang", f"more than {_SECONDS} s")
        else:
            try:
                result = self._pipe.recv()
            except EOFError:
                self._process.join()
                result = Result("died", f"exit code {self._process.exitcode}")
        if result.outcome in ("hang", "died", "memory"):  # after "memory", so that the next peak is counted from low
            self._process.kill()
            self._process.join()
            self._start()
        return result


def fuzz(kinds: list[Kind], minutes: float, inputs: int, seed: int) -> dict[str, Counter[str]]:
    """Try kinds in turn until the time is over or all inputs are made; print faults, return the counts of each kind."""
    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
    worker, end = _Worker(kinds), time.monotonic() + 60 * minutes
    for number in range(inputs):
        if time.monotonic() > end:
            break
        kind = kinds[number % len(kinds)]
        this = seed + number // len(kinds)
        result = worker.attempt(number % len(kinds), this)
        counts[kind.name][result.outcome] += 1
        if result.outcome in FAULTS and sum(counts[kind.name][fault] for fault in FAULTS) <= _SHOWN:
            print(f"{kind.name} --seed {this}: {result.outcome}: {result.detail}", flush=True)  # noqa: T201
    return counts


def main() -> int:
    """Fuzz, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--inputs", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--kind", help="only the kinds whose name holds this")
    parser.add_argument("--here", action="store_true", help="one input of each kind in this process, for a debugger")
    options = parser.parse_args()
    kinds = [kind for kind in all_kinds() if options.kind is None or options.kind in kind.name]
    if options.here:
        for kind in kinds:
            print(kind.name, *attempt(kind, options.seed))  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-cache-") as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # the user's own is left alone
        counts = fuzz(kinds, options.minutes, options.inputs, options.seed)
    print("| kind | inputs |", *(f"{outcome} |" for outcome in OUTCOMES))  # noqa: T201
    print("|" + "---|" * (2 + len(OUTCOMES)))  # noqa: T201
    for name, count in counts.items():
        print(f"| {name} | {count.total()} |", *(f"{count[outcome]} |" for outcome in OUTCOMES))  # noqa: T201
    total = sum(counts.values(), Counter())
    print(f"| all | {total.total()} |", *(f"{total[outcome]} |" for outcome in OUTCOMES))  # noqa: T201
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
