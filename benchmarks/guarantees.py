"""What the guarantees of monotone layers cost: `python -m benchmarks.guarantees --help`.

Training steps of four entries take turns in one process: the published layer with visible patches; the monotone one;
the same without what keeps its guarantees (the subspaces are not re-orthogonalised, the dictionary is not bounded); and
the monotone one with one step of sparse coding instead of two. A ratio is one of times in the same round.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal
from unittest import mock

import torch

from benchmarks.report import command_line, common_options, heading, result_path
from benchmarks.worker import CLOCKS
from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.data.files import write_whole
from crate_mae.models.devices import fastest_device
from crate_mae.models.monotone import BoundedISTA, OrthogonalSubspaces
from crate_mae.models.presets import preset

# name: the published model, the monotone one, images a step
SIZES = {
    "base": ("crate_mae_base_visible_patch16_224", "crate_mae_base_monotone_patch16_224", 8),
    "base, all tokens": ("crate_mae_base_isometric_patch16_224", "crate_mae_base_monotone_patch16_224", 8),
    "wide micro": ("crate_mae_micro_wide_patch4_32", "crate_mae_micro_wide_monotone_patch4_32", 64),
    "nano": ("crate_mae_nano_visible_patch2_8", "crate_mae_nano_monotone_patch2_8", 4),  # to try the benchmark
}
_ENTRIES = ("published", "monotone", "monotone, unconstrained", "monotone, one step")
_COMPARED = ("monotone, unconstrained", "published", "monotone, one step")  # with "monotone"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table."""
    parser = common_options(__doc__, rounds=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base", "base, all tokens", "wide micro"])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    command = command_line("benchmarks.guarantees", arguments)
    text = "\n".join([*heading("Guarantees of monotone layers", command, options), *_table(options), ""])
    what = "guarantees" if options.precision == "float32" else f"guarantees_{options.precision}"
    write_whole(result_path(what, options), text.encode())
    print(text)


def _table(options: argparse.Namespace) -> Iterator[str]:
    yield f"\nMilliseconds of a training step in {options.precision}, medians; ratios within a round (quartiles).\n"
    yield (
        "| size | images | published | monotone | unconstrained | one step "
        "| monotone / unconstrained | monotone / published | monotone / one step |\n" + "|---" * 9 + "|"
    )
    for name in options.sizes:
        seconds = _seconds(name, options.precision, options.rounds, CLOCKS[options.clock])
        medians = [f"{1000 * statistics.median(seconds[entry]):,.0f}" for entry in _ENTRIES]
        ratios = [_ratio(seconds["monotone"], seconds[other]) for other in _COMPARED]
        yield f"| {' | '.join([name, str(SIZES[name][2]), *medians, *ratios])} |"


def _seconds(
    name: str, precision: Literal["float32", "bfloat16"], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """The times of each entry, round by round, after a round that is not counted."""
    published, monotone, images = SIZES[name]
    settings = StepSettings(batch_size=images, mask_ratio=0.75, weight_decay=0.05, clip_grad=1.0, precision=precision)
    mask_tokens = "encoder" if name.endswith("all tokens") else "decoder"
    configs = {
        entry: preset(published if entry == "published" else monotone).replace(mask_tokens=mask_tokens)
        for entry in _ENTRIES
    }
    configs["monotone, one step"] = configs["monotone, one step"].replace(ista_steps=1)
    steps = {entry: TrialStep(config, settings, fastest_device()) for entry, config in configs.items()}
    found: dict[str, list[float]] = {entry: [] for entry in _ENTRIES}
    for number in range(rounds + 1):
        for entry, step in steps.items():
            with unconstrained() if entry.endswith("unconstrained") else ExitStack():
                started = clock()
                step()
                if number:
                    found[entry].append(clock() - started)
    return found


@contextmanager
def unconstrained() -> Iterator[None]:
    """While the block runs, monotone layers compute without their guarantees."""
    with (
        mock.patch.object(OrthogonalSubspaces, "retract_", lambda _self: None),
        mock.patch.object(BoundedISTA, "lasso_dictionary", lambda self: self.dictionary),
    ):
        yield


def _ratio(first: Sequence[float], second: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(first, second, strict=True)], n=4, method="inclusive"
    )
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
