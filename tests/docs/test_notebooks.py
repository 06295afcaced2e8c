"""Every tutorial is a notebook too, with the same code; one of them is run by a real kernel."""

import pytest

from docs.tools.blocks import TUTORIALS, split, tutorial

notebooks = pytest.importorskip("docs.tools.notebooks", reason="nbclient and nbformat come with the docs extra")
nbformat = notebooks.nbformat


@pytest.mark.parametrize("name", TUTORIALS)
def test_code_is_that_of_the_page(name):
    page = tutorial(name).read_text(encoding="utf-8")
    made = notebooks.notebook(page)
    nbformat.validate(made)
    code = [block.text.rstrip() for block in split(page) if block.language in ("python", "bash")]
    cells = [cell.source.removeprefix("%%bash\nset -e\n") for cell in made.cells if cell.cell_type == "code"]
    assert cells == code
    assert made == notebooks.notebook(page)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Jupyter's own, of its event loop
def test_kernel_runs_cells_and_stops_at_one_that_fails(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```bash\ncrate-mae recipes\n```\n\n```python\nx = 1\nprint(x + 1)\n```\n")
    monkeypatch.setattr(notebooks, "tutorial", lambda name: page)
    (path,) = notebooks.write(("page",), tmp_path / "built", execute=True)
    made = nbformat.read(path, as_version=4)
    shown = ["".join(output.text for output in cell.outputs) for cell in made.cells[1:]]
    assert "small_color" in shown[0]
    assert shown[1] == "2\n"
    page.write_text("```bash\ncrate-mae pretrain nowhere --out runs/never\ntrue\n```\n")
    with pytest.raises(notebooks.CellExecutionError):
        notebooks.write(("page",), tmp_path / "built", execute=True)
