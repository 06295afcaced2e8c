"""Runs the code of a page of the site, block after block, as its reader would."""

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from crate_mae.cli import main
from docs.tools.blocks import commands, split


def run_page(page: Path) -> None:
    """Run a page's Python in one namespace and its shell commands in this process, in the current folder.

    Text right after commands is what they are to print, up to spaces; `...` stands for anything.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in split(page.read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), namespace)
        elif block.language == "bash":
            printed = "".join(run_command(words) for words in commands(block.text))
        elif block.language == "text" and printed:
            assert _pattern(block.text).search(" ".join(printed.split())), printed
        if block.language != "bash":
            printed = ""


def run_command(words: list[str]) -> str:
    """Run one command line, and return what it prints; it must succeed."""
    if words[0] != "crate-mae":
        return _elsewhere(words)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main(words[1:])
        except SystemExit as stop:
            raise AssertionError(f"{words} exits with {stop.code}:\n{printed.getvalue()}") from None
    return printed.getvalue()


def _elsewhere(words: list[str]) -> str:
    """Launchers are programs of their own; they stand beside the Python that runs the tests."""
    program = shutil.which(words[0], path=Path(sys.executable).parent)
    assert program is not None, f"{words[0]} is not beside {sys.executable}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([program, *words[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _pattern(text: str) -> re.Pattern[str]:
    words = " ".join(text.split())
    return re.compile(re.escape(words).replace(r"\.\.\.", ".*?"))
