"""Tensors from files that cannot run code."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crate_mae.errors import UserError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors on the CPU, from safetensors or a PyTorch file.

    PyTorch files are pickles and are opened with `weights_only=True`, which refuses anything but tensors and plain
    containers. A dictionary under "model" or "state_dict" is unwrapped.

    Raises:
        UserError: for a file that is missing, cut short, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"There is no weights file at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors: {error}.\nIt may be cut short, or not be safetensors at all."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a file of tensors: it is damaged, or holds Python objects, which could run code."
            "\nConvert it to safetensors with the program that made it."
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors.")
    return content


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: int = 3) -> str:
    """Where two dictionaries of tensors differ in names or shapes, in words; empty if they do not."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")
