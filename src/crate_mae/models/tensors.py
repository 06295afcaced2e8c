"""Tensors from files that cannot run code."""

import argparse
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crate_mae.data.documents import read_json
from crate_mae.errors import UserError, and_more

_PREFIXES = ("module.", "model.", "_orig_mod.")  # of data parallelism, of trainers, of torch.compile


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors on the CPU, from safetensors or a PyTorch file.

    PyTorch files are pickles and are opened with `weights_only=True`, which refuses anything but tensors, plain
    containers, and the `argparse.Namespace` of options that MAE's training code, and so the official one, leaves beside
    them. A dictionary under "model" or "state_dict" is unwrapped. A file that several processes wrote in parts is named
    as if it were whole; see `stream_tensors`.

    Raises:
        UserError: for a file that is missing, cut short, or holds anything else.
    """
    if not path.is_file() and has_tensors(path):
        return dict(stream_tensors(path))
    if not path.is_file():
        raise UserError(f"There is no weights file at {path}.")
    if path.suffix == ".safetensors":
        with _damage_explained(path):
            return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
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


def without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by their names in the model itself, and the prefixes that wrappers had put before all of them."""
    found: list[str] = []
    names = dict(tensors)
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
        found.append(prefix)
    return names, found


def index_of(path: Path) -> Path:
    """The file that lists which part of `path` holds which tensor, if it was written in parts: Hugging Face's layout.

    Its parts are called `model-00001-of-00002.safetensors` and so on.
    """
    return path.with_name(f"{path.name}.index.json")


def has_tensors(path: Path) -> bool:
    """Whether a file of tensors is there, in one piece or in parts."""
    return path.is_file() or index_of(path).is_file()


def stream_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, whole or in parts, read one after another.

    Raises:
        UserError: for a file or part that is missing or damaged.
    """
    parts = [path] if path.is_file() else _parts(path)
    for part in parts:
        if not part.is_file():
            raise UserError(f"There is no weights file at {part}.")
        with _damage_explained(part), safe_open(part, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                yield name, file.get_tensor(name)


def _parts(path: Path) -> list[Path]:
    index = index_of(path)
    try:
        names = read_json(index)["weight_map"].values()
        # Paths in the index are reduced to names, so that only files beside it are read.
        return [path.with_name(Path(name).name) for name in dict.fromkeys(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is missing or damaged: {error}.") from error


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors: {error}.\nIt may be cut short, or not be safetensors at all."
        ) from error


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: int = 3) -> str:
    """Where two dictionaries of tensors differ in names or shapes, in words; empty if they do not."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return and_more(problems, most, "; ")
