"""The code blocks of a page of the site, for the tests that run them and the notebooks that are made of them."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[1]
TUTORIALS = ("your_own_folder", "read_the_report", "change_something", "fine_tune", "small_data", "many_gpus")
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)  # indented in tabs


class Block(NamedTuple):
    """A piece of a page: prose ("markdown"), or a fenced block of a language ("python", "bash", "text", ...)."""

    language: str
    text: str


def tutorial(name: str) -> Path:
    """The page of a tutorial."""
    return DOCS / "tutorials" / f"{name}.md"


def split(page: str) -> list[Block]:
    """A page as its pieces, in order; pieces of nothing but space are left out."""
    pieces, end = [], 0
    for fence in _FENCE.finditer(page):
        pieces += [Block("markdown", page[end : fence.start()]), Block(fence[2] or "text", textwrap.dedent(fence[3]))]
        end = fence.end()
    pieces.append(Block("markdown", page[end:]))
    return [piece for piece in pieces if piece.text.strip()]


def commands(bash: str) -> list[list[str]]:
    """The command lines of a block, each as its words; a backslash at the end of a line joins it with the next."""
    lines = bash.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
