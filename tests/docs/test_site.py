"""The site builds without a warning, needs no network, and says of the tree what the tree says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crate_mae import theory
from docs.tools import assemble, generated

ROOT = Path(__file__).resolve().parents[2]
NAVIGATION = re.findall(r'= "([\w/]+\.md)" }', (ROOT / "docs/zensical.toml").read_text(encoding="utf-8"))


def test_table_of_equations_has_every_function_of_the_theory():
    table = (ROOT / "docs/derivation.md").read_text(encoding="utf-8").split("## Every equation and its function")[1]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| [")]
    assert all(len(row) == 3 and "$" in row[1] + "$" and len(row[2]) > 5 for row in rows)
    named = re.findall(r"\[`(\w+)`\]\[(crate_mae\.theory\.\w+)\.(\w+)\]", table)
    assert sorted(name for name, _, _ in named) == sorted(theory.__all__)
    for name, module, target in named:
        assert name == target
        assert getattr(theory, name).__module__ == module


def test_reference_has_every_package():
    packages = {path.parent.name for path in (ROOT / "src/crate_mae").glob("*/__init__.py")}
    assert set(generated.REFERENCE) == packages
    assert {f"reference/{package}.md" for package in packages} <= set(NAVIGATION)


def test_every_page_of_docs_is_in_the_navigation():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written <= set(NAVIGATION)


def test_results_are_all_listed():
    table = generated.results(ROOT)
    for readme in (ROOT / "results").glob("*/README.md"):
        assert readme.relative_to(ROOT).as_posix() in table
    assert "crate-mae theory --out results/theory" in table


@pytest.fixture
def tree(tmp_path) -> Path:
    """A small tree with one page and one result."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results/run").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/code.py").write_text("")
    (tmp_path / "results/run/README.md").write_text(
        "# A run\n\n    crate-mae pretrain FOLDER \\\n        --out runs/a\n"
    )
    (tmp_path / "docs/zensical.toml").write_text('nav = [\n  { "Home" = "index.md" },\n  { "No" = "no.md" },\n]\n')
    return tmp_path


def test_links_hold_in_the_site(tree):
    (tree / "docs/index.md").write_text(
        "[run](../results/run/README.md#a) [code](../src/code.py) [web](https://arxiv.org) `[x](y.md)`\n"
        "\n<!-- generated: results -->\n"
    )
    assemble.assemble(tree, tree / "build")
    page = (tree / "build/docs/index.md").read_text()
    assert page.startswith("[run](results/run/index.md#a) code [web](https://arxiv.org) `[x](y.md)`\n")
    assert "### [A run](results/run/index.md)\n\n```text\ncrate-mae pretrain FOLDER \\\n    --out runs/a\n```\n" in page
    assert "no.md" not in (tree / "build/zensical.toml").read_text()


def test_link_to_a_missing_file_is_named(tree):
    (tree / "docs/index.md").write_text("[gone](../results/gone/README.md)\n")
    with pytest.raises(SystemExit, match=r"docs/index\.md: \[gone\]"):
        assemble.assemble(tree, tree / "build")


def test_formulas_become_mathml():
    markdown = pytest.importorskip("markdown", reason="the tools of the site come with the docs extra")
    pytest.importorskip("latex2mathml", reason="the tools of the site come with the docs extra")
    convert = markdown.Markdown(extensions=["docs.tools.mathml"]).convert
    shown = convert("The $a < b_k$, and `$HOME` and 5$ and 6$.")
    assert shown.count("<math") == 1
    assert "<mo>&lt;</mo>" in shown
    assert "<code>$HOME</code> and 5$ and 6$." in shown
    assert convert("<a, b> and <b>c</b>") == "<p>&lt;a, b&gt; and <b>c</b></p>"
    assert 'display="block"' in convert("$$\nx\n$$")
    assert "&amp;" not in convert(r"$R(Z) \ge 0$")


def test_site_builds_strictly_and_fetches_nothing(tmp_path):
    if shutil.which("zensical", path=Path(sys.executable).parent) is None:
        pytest.skip("Zensical, which comes with the docs extra, is not installed")
    assemble.assemble(ROOT, tmp_path)
    assemble.build(tmp_path)
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(NAVIGATION) / 2
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>", text)
        fetched += re.findall(r"<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>", text)
        assert not fetched, f"{page}: {fetched}"
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import [\"']?https?:", style.read_text(encoding="utf-8")), style
    assert "<math" in (tmp_path / "site/derivation.html").read_text(encoding="utf-8")


def test_a_warning_fails_the_build(tree):
    if shutil.which("zensical", path=Path(sys.executable).parent) is None:
        pytest.skip("Zensical, which comes with the docs extra, is not installed")
    (tree / "docs/zensical.toml").write_text('[project]\nsite_name = "a"\ndocs_dir = "docs"\nsite_dir = "site"\n')
    (tree / "docs/index.md").write_text("# A\n\n[b](#nowhere)\n")
    assemble.assemble(tree, tree / "build")
    with pytest.raises(subprocess.CalledProcessError):
        assemble.build(tree / "build")
