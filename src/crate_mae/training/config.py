"""The file `config.yaml` of a run: its options, with everything filled in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from crate_mae.data.documents import read_yaml
from crate_mae.errors import UserError
from crate_mae.options import Data, is_of_type, option_name, origin
from crate_mae.training.options import LENGTHS, FinetuneOptions, PretrainOptions, RunOptions, saved_options

_RESULT_SECTION = "\n# What decides the result. A run is resumed only with the same values.\n"
_SPEED_SECTION = "\n# Speed, safety and logging only. A resumed run may change these.\n"
_COMMAND = "command"


def differences(existing: RunOptions, config: RunOptions) -> list[str]:
    """Lines "key: value there, value now (from where)" for the options that decide the result."""
    return [
        f"{key}: {_as_text(there)} in that run, {_as_text(now)} now{_source(config, key)}"
        for key in saved_options(type(existing), speed=False)
        if (there := getattr(existing, key)) != (now := getattr(config, key))
    ]


def _source(config: RunOptions, key: str) -> str:
    """Where a value that differs comes from, in brackets."""
    origins = config.origins or {}
    source = next((name for name in (key, *(LENGTHS if key == "steps" else ())) if name in origins), None)
    if source is None:
        return ""
    return origin(config, source) or f" ({option_name(source)})"


def plain_options(config: RunOptions, *, speed: bool | None = None) -> dict[str, Any]:
    """The options of a run, or some of them (see `saved_options`), as plain values."""
    return {name: _plain(getattr(config, name)) for name in saved_options(type(config), speed=speed)}


def result_options(config: RunOptions) -> dict[str, Any]:
    """The options that decide the result, as plain values; where data is does not count, but what it is."""
    places = [item.name for item in dataclasses.fields(config) if item.type is Data]
    return {name: x for name, x in plain_options(config, speed=False).items() if name not in (*places, "model")}


def to_yaml(config: RunOptions) -> str:
    """The command, and two sections: what decides the result, and the rest."""

    def section(*, speed: bool) -> str:
        return yaml.safe_dump(plain_options(config, speed=speed), sort_keys=False, allow_unicode=True, width=120)

    return (
        "# The resolved options of this run. "
        f"To repeat it: crate-mae {config.command} --config THIS_FILE --out NEW_FOLDER\n"
        f"{_COMMAND}: {config.command}\n"
        f"{_RESULT_SECTION}{section(speed=False)}{_SPEED_SECTION}{section(speed=True)}"
    )


def load_config(path: Path) -> PretrainOptions | FinetuneOptions:
    """Read a file of `to_yaml`; `out` is the folder that it is in.

    Raises:
        UserError: if it is not such a file, with the options that are missing, unknown, or of a wrong type.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the configuration of a run.")
    kinds = {kind.command: kind for kind in (PretrainOptions, FinetuneOptions)}
    # Files of the first runs, all of pretraining, do not name their command.
    command = values.pop(_COMMAND, PretrainOptions.command)
    if not isinstance(command, str) or command not in kinds:
        raise UserError(f"{path} names the command {command!r}, but must name {' or '.join(kinds)}.")
    kind = kinds[command]
    known = saved_options(kind)
    added = {item.name: item.default for item in dataclasses.fields(kind) if item.metadata["added_later"]}
    values = {**added, **values}
    missing = [key for key in known if key not in values]
    unknown = [str(key) for key in values if key not in known]
    if missing or unknown:
        raise UserError(
            f"{path} is not the configuration of a run of this version of crate-mae.\n"
            f"Missing options: {', '.join(missing) or 'none'}. Unknown options: {', '.join(unknown) or 'none'}."
        )
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    hints = {item.name: _type_in_file(item) for item in dataclasses.fields(kind)}
    if wrong := [f"{key} is {_as_text(options[key])!r}" for key in known if not is_of_type(options[key], hints[key])]:
        raise UserError(f"{path} has options of a wrong type: {', '.join(wrong)}.")
    options |= {key: float(options[key]) for key in known if hints[key] is float}
    origins = dict.fromkeys(options, f"{path}")
    return kind(out=path.parent, **options, origins=origins)


def _type_in_file(item: dataclasses.Field) -> Any:
    """The type of an option in a file, where data is always a name."""
    if item.type is not Data:
        return item.type
    return str | None if item.default is None else str


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can write without Python's tags, and paths as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_text(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
