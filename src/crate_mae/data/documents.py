"""JSON, YAML and CSV: one guard around the parsers of all files that the library reads, and JSON that is always valid.

Files come from downloads and from other programs. A few kilobytes can ask a parser for gigabytes (aliases of aliases in
YAML), for more stack than there is (brackets in brackets), or for objects of Python. Here a document is plain values of
bounded size, or a `UserError` says what is wrong with it.
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from crate_mae.data.files import read_regular, reason_of
from crate_mae.errors import UserError

MOST_JSON_BYTES = 16 * 2**20
MOST_YAML_BYTES = 2**18
MOST_LEVELS = 64
MOST_VALUES = 1_000_000
_LARGEST = 2**128  # of whole numbers; larger ones overflow when they become floats


def read_json(path: Path) -> Any:
    """The value in a file of JSON.

    Raises:
        UserError: if the file is missing, is not JSON, or exceeds the limits above.
    """
    return parse_json(_read(path, MOST_JSON_BYTES), str(path))


def read_yaml(path: Path) -> Any:
    """The value in a file of YAML; see `read_json`. Dates stay text."""
    return parse_yaml(_read(path, MOST_YAML_BYTES), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text, or of one in UTF-8; its name is for messages.

    Raises:
        UserError: if it is not JSON, or exceeds the limits above.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
        _check(value)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, "JSON", error) from error
    return value


def parse_yaml(text: str | bytes, name: str) -> Any:
    """The value of a YAML text; see `parse_json`."""
    try:
        loader = _PlainLoader(text if isinstance(text, str) else text.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})  # before anything is built from it
        value = loader.construct_document(node)
        _check(value)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _unreadable(name, "YAML", error) from error
    return value


def to_json(value: Any, *, ascii_only: bool = False) -> str:
    """Plain values as JSON that every parser accepts: infinity and NaN, which JSON does not have, become null.

    With `ascii_only`, all other characters are written as escapes of JSON, for a terminal of any encoding.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # Bytes of a file name that are not UTF-8 are halves of surrogate pairs in Python; JSON writes them as this does.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as a table with a heading; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without dates: the date 2023-99-99 would end in a traceback."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read(path: Path, most: int) -> bytes:
    try:
        return read_regular(path, most)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}.") from error


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], level: int = 1) -> tuple[int, int]:
    """How many values a node of YAML stands for with all its aliases written out, and in how many levels."""
    if id(node) not in known:
        if level > MOST_LEVELS:  # also of a node that contains itself
            raise ValueError(f"it is nested in more than {MOST_LEVELS} levels")
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [item for pair in pairs for item in (pair if isinstance(pair, tuple) else (pair,))]
        sizes = [_measure(item, known, level + 1) for item in inner]
        known[id(node)] = (1 + sum(size for size, _ in sizes), 1 + max((height for _, height in sizes), default=0))
    size, height = known[id(node)]
    if level + height - 1 > MOST_LEVELS:
        raise ValueError(f"it is nested in more than {MOST_LEVELS} levels")
    if size > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return size, height


def _check(value: Any) -> None:
    """Raise a `ValueError` for a value that no file of this library has."""
    waiting, count = [(value, 1)], 0
    while waiting:
        found, level = waiting.pop()
        count += 1
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested in more than {MOST_LEVELS} levels")
        if count > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        if isinstance(found, dict):
            waiting += [(item, level + 1) for pair in found.items() for item in pair]
        elif isinstance(found, list):
            waiting += [(item, level + 1) for item in found]
        elif isinstance(found, str):
            found.encode()  # which a half of a surrogate pair cannot be
        elif isinstance(found, int):
            if abs(found) >= _LARGEST:
                raise ValueError(f"it has a whole number of {len(str(abs(found)))} digits")
        elif found is not None and not isinstance(found, float):
            raise ValueError(f"it has a value of the type {type(found).__name__}")


def _unreadable(name: str, kind: str, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, UnicodeError):
        reason = "it has bytes or characters that are not valid text in UTF-8"
    elif isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        reason = f"line {error.problem_mark.line + 1}: {textwrap.shorten(str(error.problem), 200)}"
    else:
        reason = textwrap.shorten(str(error), 200)
    return UserError(f"{name} cannot be read as {kind}: {reason}.")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
