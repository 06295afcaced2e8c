"""The configuration of a pretraining run, fully resolved, and its YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from crate_mae.data.files import write_whole
from crate_mae.errors import UserError

_HEADER = """\
# The resolved options of this run. To repeat it: crate-mae pretrain --config THIS_FILE --out NEW_FOLDER
"""
_RESULT_SECTION = "\n# What decides the result. A run is resumed only with the same values.\n"
_SPEED_SECTION = "\n# Speed, safety and logging only. A resumed run may change these.\n"


def _speed(**options: Any) -> Any:
    return field(metadata={"speed": True}, **options)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Every option of a run, with all defaults filled in.

    The names are those of `crate_mae.pretrain`, which explains them; `epochs` is missing, since it has become `steps`.

    `accumulation`, `compile` and `threads` change the last bits of the weights, not what is computed, and so count as
    speed. Exact resuming needs them unchanged.
    """

    data: str
    val: str | None
    model: str
    model_settings: dict[str, Any]
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask_ratio: float
    mask_tokens: Literal["encoder", "decoder"]
    norm_pix_loss: bool
    drop_path: float
    steps: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    clip_grad: float
    min_crop: float
    flip: bool
    seed: int
    precision: Literal["auto", "float32", "bfloat16"]

    accumulation: int = _speed()
    compile: bool = _speed()
    workers: int = _speed()
    threads: int = _speed()
    max_bad: float = _speed()
    checkpoint_minutes: float = _speed()
    checkpoint_epochs: int = _speed()
    log_steps: int = _speed()
    monitor_steps: int = _speed()
    trackers: tuple[str, ...] = _speed()

    def differences(self, other: PretrainConfig) -> list[str]:
        """Lines "key: value here -> value there" for the options that decide the result."""
        return [
            f"{key}: {_shown(getattr(self, key))} -> {_shown(getattr(other, key))}"
            for key in _RESULT_KEYS
            if getattr(self, key) != getattr(other, key)
        ]

    def to_yaml(self) -> str:
        """Two sections: what decides the result, and the rest."""
        values = _plain(dataclasses.asdict(self))

        def section(keys: list[str]) -> str:
            return yaml.safe_dump({key: values[key] for key in keys}, sort_keys=False, allow_unicode=True, width=120)

        return _HEADER + _RESULT_SECTION + section(_RESULT_KEYS) + _SPEED_SECTION + section(_SPEED_KEYS)

    def save(self, path: Path) -> None:
        """Write `to_yaml()` to a file, whole or not at all."""
        write_whole(path, self.to_yaml().encode())

    @classmethod
    def load(cls, path: Path) -> PretrainConfig:
        """Read a file that `save` wrote.

        Raises:
            UserError: if it is no such file, with the missing and the unknown options.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Cannot read the configuration {path}: {reason}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no options of a run.")
        known = _RESULT_KEYS + _SPEED_KEYS
        missing = [key for key in known if key not in values]
        unknown = [str(key) for key in values if key not in known]
        if missing or unknown:
            raise UserError(
                f"{path} is not the configuration of a run of this version of crate-mae.\n"
                f"Missing options: {', '.join(missing) or 'none'}. Unknown options: {', '.join(unknown) or 'none'}."
            )
        options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**options)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can say without Python's tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


_RESULT_KEYS = [f.name for f in dataclasses.fields(PretrainConfig) if "speed" not in f.metadata]
_SPEED_KEYS = [f.name for f in dataclasses.fields(PretrainConfig) if "speed" in f.metadata]
