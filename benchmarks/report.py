"""What the benchmarks have in common: their command line, and the heading of their results."""

import argparse
import datetime
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.worker import CLOCKS
from crate_mae.models.devices import fastest_device

RESULTS = Path(__file__).parent / "results"


def common_options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options of every benchmark; `rounds` is the default of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="its name in the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, beside other work")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    return parser


def result_path(what: str, options: argparse.Namespace) -> Path:
    """Where the table goes; charts and numbers go beside it."""
    return options.out / f"{what}_{options.machine}_{datetime.date.today()}.md"


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """What was typed; arguments None are those of the command line."""
    return " ".join(["python -m", module, *(sys.argv[1:] if arguments is None else arguments)])


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


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
