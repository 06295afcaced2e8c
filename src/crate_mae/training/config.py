"""The configuration of a run, fully resolved, and its YAML file."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from crate_mae.data.files import write_whole
from crate_mae.errors import UserError
from crate_mae.models.classifier import HeadPooling

_RESULT_SECTION = "\n# What decides the result. A run is resumed only with the same values.\n"
_SPEED_SECTION = "\n# Speed, safety and logging only. A resumed run may change these.\n"
_COMMAND = "command"


def _speed(**options: Any) -> Any:
    return field(metadata={"speed": True}, **options)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that all runs have, with all defaults filled in.

    The names are those of the command, which explains them; `epochs` is missing, since it has become `steps`.

    `accumulation`, `compile`, `grad_checkpointing` and `threads` change the last bits of the weights, not what is
    computed, and so count as speed. Exact resuming needs them unchanged. An option with a default here is younger than
    the first runs, whose files lack it.

    Attributes:
        command: the command, and the function of `crate_mae`, that makes such a run; the file names it.
    """

    command: ClassVar[str]

    model: str
    image_size: tuple[int, int]
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
    grad_checkpointing: bool = _speed(default=False)
    workers: int = _speed()
    threads: int = _speed()
    max_bad: float = _speed()
    checkpoint_minutes: float = _speed()
    checkpoint_epochs: int = _speed()
    log_steps: int = _speed()
    monitor_steps: int = _speed()
    trackers: tuple[str, ...] = _speed()

    @property
    def inseparable(self) -> int:
        """So many neighbours of a batch must be in one micro-batch."""
        return 1

    def differences(self, other: RunConfig) -> list[str]:
        """Lines "key: value here -> value there" for the options that decide the result."""
        return [
            f"{key}: {_shown(getattr(self, key))} -> {_shown(getattr(other, key))}"
            for key in _keys(type(self), speed=False)
            if getattr(self, key) != getattr(other, key)
        ]

    def to_yaml(self) -> str:
        """The command, and two sections: what decides the result, and the rest."""
        values = _plain(dataclasses.asdict(self))

        def section(*, speed: bool) -> str:
            chosen = {key: values[key] for key in _keys(type(self), speed=speed)}
            return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=120)

        return (
            "# The resolved options of this run. "
            f"To repeat it: crate-mae {self.command} --config THIS_FILE --out NEW_FOLDER\n"
            f"{_COMMAND}: {self.command}\n"
            f"{_RESULT_SECTION}{section(speed=False)}{_SPEED_SECTION}{section(speed=True)}"
        )

    def save(self, path: Path) -> None:
        """Write `to_yaml()` to a file, whole or not at all."""
        write_whole(path, self.to_yaml().encode())


def inseparable(mixup: float, cutmix: float) -> int:
    """How many neighbours must stay together for `mixing.Mixing`."""
    return 2 if mixup > 0 or cutmix > 0 else 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Every option of `crate_mae.pretrain`."""

    command: ClassVar[str] = "pretrain"

    data: str
    val: str | None
    model_settings: dict[str, Any]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask_ratio: float
    mask_tokens: Literal["encoder", "decoder"]
    norm_pix_loss: bool


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Every option of `crate_mae.finetune`."""

    command: ClassVar[str] = "finetune"

    train: str
    val: str
    labels: float
    pooling: HeadPooling
    layer_decay: float
    mixup: float
    cutmix: float
    rand_augment: str
    label_smoothing: float
    ema: float

    @property
    def inseparable(self) -> int:
        """Two where images are mixed, each with its neighbour."""
        return inseparable(self.mixup, self.cutmix)


def load_config(path: Path) -> PretrainConfig | FinetuneConfig:
    """Read a file that `RunConfig.save` wrote, of whichever kind it says.

    Raises:
        UserError: if it is no such file, with the options that are missing, unknown, or of a wrong type.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot read the configuration {path}: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options of a run.")
    kinds = {kind.command: kind for kind in (PretrainConfig, FinetuneConfig)}
    command = values.pop(_COMMAND, PretrainConfig.command)  # the first runs were of one kind, and did not say so
    if not isinstance(command, str) or command not in kinds:
        raise UserError(f"{path} is of the command {command!r}, but a run is of {' or '.join(kinds)}.")
    kind = kinds[command]
    known = [option.name for option in dataclasses.fields(kind)]
    younger = {option.name: option.default for option in dataclasses.fields(kind)}
    values = {key: default for key, default in younger.items() if default is not dataclasses.MISSING} | values
    missing = [key for key in known if key not in values]
    unknown = [str(key) for key in values if key not in known]
    if missing or unknown:
        raise UserError(
            f"{path} is not the configuration of a run of this version of crate-mae.\n"
            f"Missing options: {', '.join(missing) or 'none'}. Unknown options: {', '.join(unknown) or 'none'}."
        )
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    hints = get_type_hints(kind)
    if wrong := [f"{key} is {_shown(options[key])!r}" for key in known if not _fits(options[key], hints[key])]:
        raise UserError(f"{path} has options of a wrong type: {', '.join(wrong)}.")
    options |= {key: float(options[key]) for key in known if hints[key] is float}
    return kind(**options)


def _keys(kind: type[RunConfig], *, speed: bool) -> list[str]:
    """Names of the options that decide the result, the kind's own first, or of the others."""
    shared = [option.name for option in dataclasses.fields(RunConfig)]
    named = sorted(dataclasses.fields(kind), key=lambda option: option.name in shared)
    return [option.name for option in named if ("speed" in option.metadata) == speed]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a file is of an option's type; whole numbers pass for fractions, true and false do not."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, inner[0]) for key in value)
    if origin is tuple:
        parts = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can say without Python's tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
