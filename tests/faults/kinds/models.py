"""Configurations of models and runs, headers of weights, and numbers on the command line."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import crate_mae
from crate_mae.cli import main
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.training.config import load_config, to_yaml
from crate_mae.training.options import PretrainOptions
from tests.faults.fuzz import Kind
from tests.faults.kinds.sources import mutated

_NUMBERS = (0, 1, -1, 2, 3, 7, 1000, 2**16, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308)
_ODD = (None, True, "", "x" * 1000, "\ud800", "a\x1b[31m", [], {}, [1, 2], [[1]], {"a": {}}, float("nan"), float("inf"))
_WORDS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-0",
    "2.5",
    "1e3",
    "9" * 5000,
    "",
    " ",
    "0x10",
    "1_000",
    "٣",
    "\x00",
    "--",
    "x",
)


def odd_value(rng: random.Random) -> Any:
    """A value that a configuration may have, or may not."""
    return rng.choice(_NUMBERS) if rng.random() < 0.6 else rng.choice(_ODD)


def _model(rng: random.Random, folder: Path) -> Path:
    name = rng.choice(("crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8", "crate_mae_nano_monotone_patch2_8"))
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "decoder_depth": 1, "in_chans": 1}
    crate_mae.save(crate_mae.create_model(name, **sizes), folder)
    return folder


def odd_description(rng: random.Random, folder: Path) -> Path:
    """A model whose config.json has other values, or is damaged as text."""
    path = _model(rng, folder) / "config.json"
    if rng.random() < 0.3:
        path.write_bytes(mutated(rng, path.read_bytes()))
        return folder
    values = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 4))):
        values[rng.choice([*values, "unknown"])] = odd_value(rng)
    path.write_text(json.dumps(values))
    return folder


def odd_header(rng: random.Random, folder: Path) -> Path:
    """A model whose file of weights has another header, or damaged bytes."""
    path = _model(rng, folder) / "model.safetensors"
    content = path.read_bytes()
    if rng.random() < 0.4:
        path.write_bytes(mutated(rng, content))
        return folder
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice([name for name in header if name != "__metadata__"])
        match rng.randrange(4):
            case 0:
                header[name]["shape"] = rng.choice(([2**40], [0], [], [-1], [2**63, 2], odd_value(rng)))
            case 1:
                header[name]["dtype"] = rng.choice(("F8_E4M3", "I8", "BOOL", "F4", "F16", "x", odd_value(rng)))
            case 2:
                header[name]["data_offsets"] = rng.choice(([0, 0], [2**62, 2**63], [5, 1], odd_value(rng)))
            case 3:
                header[rng.choice(("encoder.blocks.999999.norm1.weight", "a\x1bb", ""))] = header.pop(name)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", rng.choice((len(text), len(text), 2**62, 0))) + text + content[8 + length :])
    return folder


def odd_run(rng: random.Random, folder: Path) -> Path:
    """The config.yaml of a run with other values, or damaged as text."""
    lines = to_yaml(PretrainOptions("digits", out=folder, steps=3)).splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        odd = (
            json.dumps(odd_value(rng))
            if rng.random() < 0.5
            else rng.choice(("2023-99-99", "!!set {a}", "*x", "&a [*a]"))
        )
        lines[at] = f"{lines[at].partition(':')[0]}: {odd}"
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / "config.yaml"
    path.write_bytes(mutated(rng, content) if rng.random() < 0.3 else content)
    return path


def odd_words(rng: random.Random, folder: Path) -> list[str]:
    """A command with an odd number for one of its options."""
    model, out = "crate_mae_nano_patch2_8", str(folder / "out")
    command = rng.choice(
        (
            ["reconstruct", model, "digits:test", "--out", f"{out}.png", "--count", "2"],
            ["eval", "reconstruction", model, "digits:test", "--count", "2", "--mask-ratios", "0.5"],
            ["embed", model, "digits:test", "--out", f"{out}.npy", "--no-cache"],
            ["estimate", "--model", model, "--batch-size", "4"],
        )
    )
    options = {
        "reconstruct": ("--mask-ratio", "--count", "--seed"),
        "eval": ("--mask-ratios", "--count", "--seed", "--batch-size"),
        "embed": ("--layer", "--batch-size", "--max-bad", "--seed"),
        "estimate": ("--mask-ratio", "--batch-size", "--devices", "--image-size", "--flops-per-s", "--epochs"),
    }
    word = rng.choice(_WORDS) if rng.random() < 0.6 else str(rng.choice((-1, 0, 0.06, 0.94, 0.999, 1, 1.5, 3, 10**12)))
    return [*command, rng.choice(options[command[0]]), word]


def _command(words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(words)
        except SystemExit as stop:
            if stop.code != 2:
                raise RuntimeError(f"exit code {stop.code}: {said.getvalue()[-300:]}") from stop


KINDS = [
    Kind("config.json", odd_description, (crate_mae.load, open_backbone)),
    Kind("safetensors", odd_header, (crate_mae.load, open_backbone)),
    Kind("config.yaml", odd_run, (load_config,)),
    Kind("numbers", odd_words, (_command,)),
]
