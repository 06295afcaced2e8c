"""Make a Jupyter notebook of every tutorial, from the page itself: prose becomes cells of prose, code cells of code.

    python -m docs.tools.notebooks              # build/notebooks/NAME.ipynb
    python -m docs.tools.notebooks --execute    # and run them, one after the other, in that folder

They are not committed: what is in the tree is the page.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError as CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from docs.tools.blocks import DOCS, TUTORIALS, Block, split, tutorial

BUILD = DOCS.parent / "build" / "notebooks"


def notebook(page: str) -> NotebookNode:
    """A page as a notebook; its shell commands are run as a shell's, and what they print on the page is left out."""
    cells, printed = [], False
    for block in split(page):
        if not (block.language == "text" and printed):
            cells.append(_cell(block))
        printed = block.language == "bash"
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # Otherwise drawn at random, and every build would differ.
    made = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nbformat.validate(made)
    return made


def _cell(block: Block) -> NotebookNode:
    if block.language == "python":
        return new_code_cell(block.text.rstrip())
    if block.language == "bash":
        # A cell of bash stops at a failing command only when told to.
        return new_code_cell(f"%%bash\nset -e\n{block.text.rstrip()}")
    return new_markdown_cell(block.text.strip() if block.language == "markdown" else f"```\n{block.text}```")


def write(names: tuple[str, ...] = TUTORIALS, folder: Path = BUILD, *, execute: bool = False) -> list[Path]:
    """Write the notebooks of tutorials into a folder, and run them there if asked to.

    Args:
        names: tutorials, in the order in which they build on each other.
        folder: where to; it is emptied of what an earlier run left, if they are executed.
        execute: run every cell, and keep what it shows.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    if execute:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # The command beside this Python, whether or not its environment is active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    paths = []
    for name in names:
        made = notebook(tutorial(name).read_text(encoding="utf-8"))
        if execute:
            NotebookClient(made, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
        paths.append(folder / f"{name}.ipynb")
        nbformat.write(made, paths[-1])
    return paths


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Make a notebook of every tutorial, in build/notebooks.")
    parser.add_argument("--execute", action="store_true", help="run them as well")
    for path in write(execute=parser.parse_args().execute):
        print(path)


if __name__ == "__main__":
    main()
