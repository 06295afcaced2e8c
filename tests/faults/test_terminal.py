"""Names of files and classes cannot control the terminal, and any terminal can display them."""

import io
import logging
import re

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from crate_mae.cli import main
from crate_mae.commands.console import progress
from crate_mae.terminal import clean_warnings, open_console, printable

NAMES = {
    "colour": ("a\x1b[31mb", r"a\x1b[31mb"),
    "title": ("a\x1b]0;title\x07b", r"a\x1b]0;title"),
    "one character for two": ("a\x9b31mb", r"a\x9b31mb"),
    "carriage return": ("a\rb", "ab"),
    "backwards": ("a\u202egpj.exe", r"a\u202egpj.exe"),
    "not UTF-8": ("a\udcffb", r"a\udcffb"),
    "line separator": ("a\u2028b", r"a\u2028b"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", NAMES)
def test_names_reach_a_terminal_as_text(name, encoding):
    raw, _ = NAMES[name]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = open_console(file=terminal, force_terminal=True, width=60)
    console.print(f"Left out: {raw}: ü", markup=False, soft_wrap=True)
    table = Table("file", raw)
    table.add_row(Text(raw), raw)
    console.print(table)
    with Progress(console=console) as progress:
        progress.advance(progress.add_task(raw, total=3))
    with console.status(raw):
        pass
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    own = re.sub(r"\x1b\[[0-9;?]*[mKAlh]|\r", "", printed)  # of rich: styles, and the cursor of a progress bar
    assert "\x1b[31mb" not in printed
    assert not set(own) & {"\x1b", "\x07", "\x9b", "\u202e", "\u2028", "\udcff"}
    assert "Left out: a" in own


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"carriage return", "title"}))
def test_unsafe_characters_are_written_out(name):
    raw, clean = NAMES[name]
    assert printable(raw) == clean


def test_names_are_not_taken_for_markup_or_emoji():
    terminal, name = io.StringIO(), "photos[/b] [red] x:cat:"
    console = open_console(file=terminal, force_terminal=True, width=90)
    console.print_text(name)
    table = Table(name)
    table.add_row(name)
    console.print(table)
    with progress(console, "photos[/b] [red]", 3) as advance:
        advance()
    assert terminal.getvalue().count(name) == 3 and "photos[/b] [red] " in terminal.getvalue().rpartition(name)[2]


def test_other_characters_stay():
    text = "Größe 猫 می‌خواهم \U0001f468‍\U0001f469\tx\n"
    assert printable(text) == text
    assert printable("Größe", "ascii") == r"Gr\xf6\xdfe"


def test_error_messages_are_clean(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["resume", "no\x1b[31mrun"])
    assert stop.value.code == 2
    assert r"no\x1b[31mrun" in capsys.readouterr().err


def test_warnings_that_are_logged_are_clean(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("crate_mae"), "propagate", False)  # to the handlers of pytest
    with clean_warnings():
        logging.getLogger("crate_mae.somewhere").warning("Left out: %s", "a\x1b[31mb")
    logging.getLogger("crate_mae.somewhere").warning("%s", "a\x1b[31mb")  # as in other programs
    assert capsys.readouterr().err == "Left out: a\\x1b[31mb\na\x1b[31mb\n"
