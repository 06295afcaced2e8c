"""The site builds without a warning, needs no network, and says of the tree what the tree says."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from crate_mae import theory
from crate_mae.models.presets import list_bundled, list_models
from docs.tools import assemble, generated
from docs.tools.blocks import TUTORIALS

ROOT = Path(__file__).resolve().parents[2]
NAVIGATION = re.findall(r'= "([\w/]+\.md)" }', (ROOT / "docs/zensical.toml").read_text(encoding="utf-8"))


def test_table_of_equations_has_every_function_of_the_theory():
    table = (ROOT / "docs/derivation.md").read_text(encoding="utf-8").split("## Every equation and its function")[1]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| [")]
    assert all(len(row) == 3 and "$" in row[1] + "$" and len(row[2]) > 5 for row in rows)
    named = re.findall(r"\[`(\w+)`\]\[(crate_mae\.theory\.\w+)\.(\w+)\]", table)
    public = [name for name, value in vars(theory).items() if name[0] != "_" and not isinstance(value, ModuleType)]
    assert sorted(name for name, _, _ in named) == sorted(public)
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


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if shutil.which("zensical", path=Path(sys.executable).parent) is None:
        pytest.skip("Zensical, which comes with the docs extra, is not installed")
    build = tmp_path_factory.mktemp("build")
    assemble.assemble(ROOT, build)
    assemble.build(build)
    return build / "site"


def test_site_builds_strictly_and_fetches_nothing(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(NAVIGATION) / 2
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>", text)
        fetched += re.findall(r"<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>", text)
        assert not fetched, f"{page}: {fetched}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import [\"']?https?:", style.read_text(encoding="utf-8")), style
    for name in TUTORIALS:
        page = (site / f"tutorials/{name}.html").read_text(encoding="utf-8")
        assert f"../notebooks/{name}.ipynb" in page
        json.loads((site / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))


def test_the_font_has_every_character_of_a_formula(site):
    ttlib = pytest.importorskip("fontTools.ttLib", reason="comes with Matplotlib")
    known = ttlib.TTFont(ROOT / "docs/fonts/math.woff")
    assert "MATH" in known
    pages = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    formulas = [re.sub("<[^>]*>", "", found) for page in pages for found in re.findall(r"<math.*?</math>", page, re.S)]
    assert len(formulas) > 100
    assert set(map(ord, html.unescape("".join(formulas)))) <= {*known.getBestCmap(), ord("\n")}


def test_a_reader_without_a_server_finds_pages_and_sees_formulas(site, chromium):
    tab = chromium.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((site / "derivation.html").as_uri())
    assert tab.evaluate("document.fonts.ready.then(() => document.fonts.check('16px Mathematics', 'Σ'))")
    tab.keyboard.press("Control+k")
    tab.wait_for_function("document.activeElement.shadowRoot?.activeElement?.tagName === 'INPUT'")
    tab.locator("input:focus").fill("Holm correction")
    tab.wait_for_selector("a[href*='read_the_report.html']:visible mark, a[href*='read_the_report.html']:visible em")
    tab.close()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}


def test_a_warning_fails_the_build(tree):
    if shutil.which("zensical", path=Path(sys.executable).parent) is None:
        pytest.skip("Zensical, which comes with the docs extra, is not installed")
    (tree / "docs/zensical.toml").write_text('[project]\nsite_name = "a"\ndocs_dir = "docs"\nsite_dir = "site"\n')
    (tree / "docs/index.md").write_text("# A\n\n[b](#nowhere)\n")
    assemble.assemble(tree, tree / "build")
    with pytest.raises(subprocess.CalledProcessError):
        assemble.build(tree / "build")


def test_tables_of_models_agree_with_the_results():
    trained = generated.trained(ROOT)
    kept = [f"trained_models/{config.parent.name}" for config in ROOT.glob("trained_models/*/config.json")]
    assert set(generated.TRAINED_MODELS) == {*list_bundled(), *kept}
    assert "| `trained_models/crate_mae_micro_cifar10` | 2.73 M | 0.489 | 64.4% (63.4 to 65.3) |" in trained
    assert "| `crate_mae_micro_monotone_cifar10` | 1.86 M | 0.529 | 64.0%" in trained
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    budgets = generated.budgets(ROOT)
    probes = re.findall(r"\| (\d\d\.\d)% \|", budgets)
    for share in ("38.5", "50.2", "54.6", "51.9", "37.4", "48.9", "55.6", "61.4", "57.9"):
        assert share in probes
        assert share in readme
    assert generated.presets(ROOT).count("\n") == len(list_models()) + 1
