"""Text for terminals and logs: what comes from outside cannot move the cursor, set a title or change a colour."""

import logging
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_KEPT = "\n\t"
# Control characters, halves of surrogate pairs (bytes of a file name that are not UTF-8), and separators of lines.
_UNSAFE_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # which reorder text


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""The text with what a terminal or file of this encoding would act on, or cannot hold, as Python does: "\x1b"."""
    if not text.isascii() or not text.isprintable():
        text = "".join(
            character.encode("unicode_escape").decode("ascii") if _is_unsafe(character) else character
            for character in text
        )
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _is_unsafe(character: str) -> bool:
    if character in _KEPT:
        return False
    return unicodedata.category(character) in _UNSAFE_CATEGORIES or character in _DIRECTIONS


class CleanConsole(Console):
    """A console of rich on which all text is made `printable`: names of files and classes, messages of libraries."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's segments, with clean text; only rich itself styles them and moves the cursor."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, self.encoding))

    def print_text(self, text: str) -> None:
        """Print a text without breaking its lines."""
        self.print(text, soft_wrap=True)


class CleanFormatter(logging.Formatter):
    """Formats the lines of a log as `printable` text: a log is read on a terminal, and written in UTF-8."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))


@contextmanager
def clean_warnings() -> Iterator[None]:
    """Have `logging` print warnings of libraries as `printable` text, where nothing else is set up for them."""
    handler = logging.lastResort
    if handler is None:
        yield
        return
    before = handler.formatter
    handler.setFormatter(CleanFormatter())
    try:
        yield
    finally:
        handler.setFormatter(before)


def open_console(**options: Any) -> CleanConsole:
    """A console of rich, with its options, in which names are not taken for colours, markup or emoji."""
    return CleanConsole(highlight=False, markup=False, emoji=False, **options)
