"""The page about other tools does what it says, section by section, where the tools are installed."""

import json
import re
import subprocess
import sys

import pytest

from docs.tools.blocks import DOCS, split
from tests.docs.runner import _pattern

PAGE = (DOCS / "other_tools.md").read_text(encoding="utf-8")
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
TITLES = [section.splitlines()[0] for section in SECTIONS]
NOT_FOR_DEVELOPMENT = {"pytorch_grad_cam"}  # it needs OpenCV

# In one process of its own, without checks of shapes: what these add to a program cannot be traced.
RUN = """
import contextlib, io, json, pathlib, sys, tempfile, warnings

warnings.simplefilter("ignore")
codes = json.load(sys.stdin)
space, found = {"__name__": "__main__"}, []
file = pathlib.Path(tempfile.mkdtemp()) / "section"  # nnsight reads the source of what it traces
for number, code in enumerate(codes):
    printed, path = io.StringIO(), file.with_suffix(f".{number}.py")
    path.write_text(code)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(path), "exec"), space)
        found.append({"printed": printed.getvalue()})
    except ModuleNotFoundError as error:
        found.append({"missing": error.name})
print(json.dumps(found))
"""


def code_and_text(part: str) -> tuple[str, str]:
    blocks = split(part)
    return tuple("\n".join(block.text for block in blocks if block.language == kind) for kind in ("python", "text"))


@pytest.fixture(scope="module")
def results():
    codes = [code_and_text(part)[0] for part in (INTRODUCTION, *SECTIONS)]
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=json.dumps(codes), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(["introduction", *TITLES], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("title", "part"), [*zip(["introduction", *TITLES], [INTRODUCTION, *SECTIONS], strict=True)])
def test_section(title, part, results):
    result = results[title]
    if "missing" in result:
        assert result["missing"] in NOT_FOR_DEVELOPMENT, result
        pytest.skip(f"{result['missing']} is not installed: it is no dependency of development")
    text = code_and_text(part)[1]
    assert text and _pattern(text).fullmatch(" ".join(result["printed"].split())), result["printed"]
