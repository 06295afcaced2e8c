"""Files of tensors in parts, one a process, in the layout in which Hugging Face splits large models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.models.tensors import index_of


def share_out(tensors: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """Which process holds which tensor: each goes, in order, to the one that holds the fewest numbers so far."""
    held = [0] * processes
    holder: dict[str, int] = {}
    for name, tensor in tensors.items():
        holder[name] = held.index(min(held))
        held[holder[name]] += tensor.numel()
    return holder


def part_of(path: Path, process: int, processes: int) -> Path:
    """The part of a file that a process writes: `model-00001-of-00002.safetensors`."""
    return path.with_name(f"{path.stem}-{process + 1:05}-of-{processes:05}{path.suffix}")


def write_index(path: Path, holder: Mapping[str, int], processes: int) -> None:
    """Write beside the parts of a file which of them holds which tensor.

    Raises:
        UserError: if a part is missing.
    """
    parts = [part_of(path, process, processes) for process in range(processes)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{', '.join(missing)} did not appear in {path.parent}.\nGive an --out that all machines share."
        )
    names = {name: parts[process].name for name, process in holder.items()}
    size = sum(part.stat().st_size for part in parts)
    content = {"metadata": {"total_size": size}, "weight_map": names}
    index_of(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
