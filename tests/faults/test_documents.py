"""Files of JSON and YAML that ask their parsers for too much, or hold what no file of this library holds."""

import json
import os

import pytest

from crate_mae.data.documents import MOST_LEVELS, parse_json, parse_yaml, read_json, read_yaml, to_json
from crate_mae.errors import UserError

ALIASES = "[&b0 [x, x, x, x]" + "".join(f", &b{i} [{','.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 10)) + "]"
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
HOSTILE_YAML = {
    "aliases of aliases": ALIASES,
    "merges of merges": MERGES,
    "a long chain of aliases": "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
    "an alias of itself": "&a [*a]",
    "lists in lists": "[" * 20_000,
    "mappings in mappings": "{a: " * 20_000,
    "keys of keys": "? " * 20_000,
    "a Python object": "!!python/object/apply:os.system ['true']",
    "a tagged date": "!!timestamp 2023-99-99",
    "binary data": "!!binary aGVsbG8=",
    "a set": "!!set {x, y}",
    "5,000 digits": "9" * 5000,
    "400 digits": "9" * 400,
    "half a surrogate pair": '"\\ud800"',
    "a control character": "a: \x00",
    "two documents": "a: 1\n---\nb: 2",
    "a list as a key": "? [1]\n: 2",
    "an unknown alias": "*unknown",
}
HOSTILE_JSON = {
    "lists in lists": "[" * 100_000,
    "mappings in mappings": '{"a":' * 100_000,
    "more levels than allowed": "[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1),
    "5,000 digits": "9" * 5000,
    "400 digits": "9" * 400,
    "half a surrogate pair": '"\\ud800"',
    "no JSON": "{'a': 1}",
    "nothing": "",
}


@pytest.mark.parametrize("damage", HOSTILE_YAML)
def test_hostile_yaml_is_refused(damage):
    with pytest.raises(UserError, match=r"^the file cannot be read as YAML: .{3,210}\.$"):
        parse_yaml(HOSTILE_YAML[damage], "the file")


@pytest.mark.parametrize("damage", HOSTILE_JSON)
def test_hostile_json_is_refused(damage):
    with pytest.raises(UserError, match=r"^the file cannot be read as JSON: .{3,210}\.$"):
        parse_json(HOSTILE_JSON[damage], "the file")


def test_what_is_no_number_stays_text():
    assert parse_yaml("day: 2023-99-99\nlr: 1.5e-4\nsteps: 7", "the file") == {
        "day": "2023-99-99",
        "lr": 1.5e-4,
        "steps": 7,
    }
    assert parse_yaml("", "the file") is None
    assert parse_yaml("a: &a [1, 2]\nb: *a", "the file") == {"a": [1, 2], "b": [1, 2]}  # as PyYAML writes them


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_regular_files_of_limited_size_are_read(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "zeros", "sparse", "bytes", "missing", "."):
        with pytest.raises(UserError, match=str(tmp_path)):
            read(tmp_path / name)


def test_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "file") == read_yaml(tmp_path / "file") == {"a": 1}


def test_json_is_valid_with_any_number_and_any_name():
    text = to_json({"psnr": float("inf"), "file\udcff": (1, float("nan")), "ü": [float("-inf"), 0.5]})
    assert "ü" in text
    text.encode()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {"psnr": None, "file\udcff": [1, None], "ü": [None, 0.5]}
