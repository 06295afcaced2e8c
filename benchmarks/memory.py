"""Estimated memory beside that of a process: `python -m benchmarks.memory --help`.

Resident memory at the peak of a training step above what the process had after its imports, each model in a process of
its own, beside the estimate for a CPU.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.report import command_line, common_options, heading, result_path
from crate_mae.costs.memory import memory_estimate, step_memory
from crate_mae.costs.trial import StepSettings
from crate_mae.data.files import write_whole
from crate_mae.models.presets import preset

PRECISIONS = ("float32", "bfloat16")
# Preset, changed settings, images. Settings that no other row has guard against a count that fits the presets alone.
MODELS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("crate_mae_micro_patch4_32", {}, 64),
    ("crate_mae_micro_patch4_32", {}, 128),
    ("crate_mae_micro_visible_patch4_32", {}, 64),
    (
        "crate_mae_micro_patch4_32",
        {"embed_dim": 384, "depth": 3, "decoder_embed_dim": 192, "decoder_depth": 2, "in_chans": 1},
        31,
    ),
    ("crate_mae_tiny_patch16_224", {}, 8),
    ("crate_mae_base_patch16_224", {}, 4),
    ("crate_mae_base_visible_patch16_224", {}, 8),
    ("vit_mae_micro_patch4_32", {}, 64),
    ("vit_mae_base_patch16_224", {}, 4),
)
_HEAD = "| model | images | precision | measured | estimate | | tensors alone |\n" + "|---" * 7 + "|"


class Row(NamedTuple):
    """One line of the table, in bytes."""

    name: str
    images: int
    precision: str
    measured: float
    estimate: int
    tensors: int

    @property
    def error(self) -> float:
        """Of the estimate, as a share of what was measured."""
        return self.estimate / self.measured - 1

    def __str__(self) -> str:
        measured, estimate, tensors = (f"{value / 1e6:,.0f} MB" for value in self[3:])
        return (
            f"| {self.name} | {self.images} | {self.precision} | {measured} | {estimate} | {self.error:+.1%} "
            f"| {tensors} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table."""
    options = _parser().parse_args(arguments)
    rows = list(_rows(options))
    near = [sum(abs(row.error) <= limit for row in rows) for limit in (0.1, 0.15)]
    said = f"Of {len(rows)} estimates, {near[0]} are within 10% and {near[1]} within 15%. Measured: median of rounds.\n"
    command = command_line("benchmarks.memory", arguments)
    text = "\n".join([*heading("Estimated memory", command, options), said, _HEAD, *map(str, rows), ""])
    write_whole(result_path("memory", options), text.encode())
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = common_options(__doc__, rounds=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    return parser


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for name, settings, images in MODELS:
        for precision in options.precisions:
            yield _row(name, settings, images, precision, options)


def _row(name: str, changed: dict[str, Any], images: int, precision: str, options: argparse.Namespace) -> Row:
    config = preset(name).replace(**changed)
    settings = StepSettings(batch_size=images, mask_ratio=0.75, weight_decay=0.05, clip_grad=1.0, precision=precision)
    found = [step_memory(config, settings, torch.device("cpu"), options.threads) for _ in range(options.rounds)]
    measured = statistics.median(value for value in found if value is not None)
    estimated = memory_estimate(config, settings)
    label = ", ".join([name, *(f"{key} {value}" for key, value in changed.items())])
    return Row(label, images, precision, measured, estimated.resident, estimated.tensors)


if __name__ == "__main__":
    main()
