"""Whatever a page says of our commands is so: the commands are there, and so are their options, recipes and models."""

import re
from pathlib import Path

import pytest

from crate_mae.cli import build_app
from crate_mae.models.presets import list_bundled, list_models
from crate_mae.training.recipes import list_recipes
from docs.tools.blocks import split

ROOT = Path(__file__).resolve().parents[2]
# The log tells of options as they were on its days.
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")]
# In code a command begins a line, or follows a launcher; in prose it is indented or between backticks. It ends with its
# line, its backtick, or where a shell's comment begins.
_REST = r"((?:[^\n`#\\]|\\\n)*)"
IN_CODE = re.compile(rf"(?:^crate-mae|-m crate_mae) {_REST}", flags=re.MULTILINE)
IN_PROSE = re.compile(rf"(?:^ {{4,}}crate-mae|`crate-mae|-m crate_mae) {_REST}", flags=re.MULTILINE)
OF_ALL = ("--help", "--version", "--install-completion")  # options of `crate-mae` itself
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
LAUNCHERS = {"--nproc-per-node", "--standalone", "--config_file", "--multi_gpu", "--num_machines", "--num_processes"}
LAUNCHERS |= {"--main_process_ip", "--main_process_port", "--machine_rank", "--nnodes", "--execute", "--serve"}


def names_of(command) -> set[str]:
    """The options of a command, in every spelling that it takes."""
    return {name for argument in command.assemble_argument_collection() for name in argument.names}


def every_option(app) -> set[str]:
    parts = [app[name] for name in below(app)]
    return set().union(*(every_option(part) if below(part) else names_of(part) for part in parts))


def below(command) -> list[str]:
    """The commands of a command, such as those of `eval`."""
    return [name for name in command if not name.startswith("-")]


@pytest.fixture(scope="module")
def app():
    return build_app()


@pytest.fixture(scope="module")
def options(app) -> set[str]:
    return every_option(app) | {*OF_ALL, "--config"}


def described(page: Path) -> list[str]:
    found = []
    for block in split(page.read_text(encoding="utf-8")):
        found += (IN_PROSE if block.language == "markdown" else IN_CODE).findall(block.text)
    return found


def test_options_are_found(options):
    assert {"--mask-ratio", "--val", "--stride", "--flops-per-s", "--sample"} <= options
    assert "--bach-size" not in options
    assert sum(len(described(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_their_options_are_there(page, app):
    for text in described(page):
        words, command = text.replace("\\\n", " ").split(), app
        while words and words[0] not in ("COMMAND", "...", *OF_ALL) and below(command):
            assert words[0] in below(command), f"crate-mae {text}"
            command = command[words.pop(0)]
        if not below(command):
            asked = set(OPTION.findall(" ".join(words))) - {"--help", "--config"}
            assert asked <= names_of(command), f"crate-mae {text}"
        for recipe in re.findall(r"--recipe ([a-z_]+)", text):
            assert recipe in list_recipes()
        for folder, model in re.findall(r"\b(trained_models/)?((?:crate|vit)_mae_\w+(?<!_))", text):
            is_there = (ROOT / folder / model).is_dir() if folder else model in [*list_models(), *list_bundled()]
            assert is_there, f"crate-mae {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_named_in_passing_are_of_some_command(page, options):
    inline = re.findall(r"`(--[^`\n]+)`", page.read_text(encoding="utf-8"))
    for text in inline:
        assert set(OPTION.findall(text)) <= options | LAUNCHERS, text


def test_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    here = {
        path.name
        for folder in ("src", "tests", "docs", "benchmarks", "examples", "results", "trained_models")
        for path in (ROOT / folder).rglob("*")
    }
    for name in re.findall(r"\b[\w]+\.(?:py|md|yaml|sh)\b", text):
        assert name in here | {path.name for path in ROOT.iterdir()} | {"comparison.yaml"}, name
    for target in re.findall(r"^    make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), target
