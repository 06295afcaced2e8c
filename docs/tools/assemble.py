"""Build the site: gather pages and results of the tree into `build/docs`, generate what is generated, run Zensical.

    python -m docs.tools.assemble            # build/site/index.html
    python -m docs.tools.assemble --serve    # the same, on a local port, built again when `build/docs` changes

A link to a file that is not there fails the build, as any warning of Zensical does.
"""

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from docs.tools import generated

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", flags=re.MULTILINE | re.DOTALL)
_FONT = re.compile(r"url\((fonts/[\w.]+\.woff)\)")
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", flags=re.MULTILINE)


def site_files(root: Path = ROOT) -> dict[Path, Path]:
    """Every file of the tree that is part of the site, and where it is there; both relative."""
    found: dict[Path, Path] = {}
    for path in _files(root / "docs"):
        inside = path.relative_to(root / "docs")
        if inside.parts[0] != "tools" and inside.name != "zensical.toml":
            found[path.relative_to(root)] = inside
    for folder in ("results", "benchmarks", "examples"):
        for path in _files(root / folder):
            inside = path.relative_to(root)
            # A folder's README is its page; Python is read in the tree.
            if path.suffix != ".py":
                found[inside] = inside.with_name("index.md") if inside.name == "README.md" else inside
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        if (root / name).is_file():
            found[Path(name)] = Path(name.lower())
    return found


def assemble(root: Path = ROOT, build: Path = BUILD) -> None:
    """Write `build/docs` and `build/zensical.toml` anew.

    Raises:
        SystemExit: if a page links to a file that is not there.
    """
    reference, missing = generated.reference_pages(root), []
    written = site_files(root)
    files = written | {Path("docs") / name: Path(name) for name in reference}
    shutil.rmtree(build / "docs", ignore_errors=True)
    for source, target in written.items():
        (build / "docs" / target).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text, broken = page(source, root, files)
            (build / "docs" / target).write_text(text, encoding="utf-8")
            missing += [f"{source}: {link}" for link in broken]
        elif source.suffix == ".css":
            (build / "docs" / target).write_text(_with_fonts(root / source), encoding="utf-8")
        else:
            shutil.copyfile(root / source, build / "docs" / target)
    for name, text in reference.items():
        (build / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (build / "docs" / name).write_text(text, encoding="utf-8")
    _write_notebooks(root, build / "docs" / "notebooks")
    (build / "zensical.toml").write_text(_configuration(root, build / "docs"), encoding="utf-8")
    if missing:
        sys.exit("Links to files that are not there:\n  " + "\n  ".join(missing))


def page(source: Path, root: Path, files: dict[Path, Path]) -> tuple[str, list[str]]:
    """A page as the site has it, and its links to files that are not there."""
    text = _MARK.sub(lambda mark: generated.PARTS[mark[1]](root), (root / source).read_text(encoding="utf-8"))
    if source.parent == Path("docs/tutorials"):
        link = f'<a href="../notebooks/{source.stem}.ipynb" download>Jupyter notebook</a>'
        text += f"\nThis tutorial is also a {link}.\n"
    pieces = _CODE.split(text)
    broken: list[str] = []
    # Every other piece is code, in which brackets are brackets.
    pieces[::2] = [_LINK.sub(lambda link: _moved(link, source, root, files, broken), piece) for piece in pieces[::2]]
    return "".join(pieces), broken


def _with_fonts(style: Path) -> str:
    """A style sheet that contains its fonts: not every browser loads fonts of pages that are read from disk."""

    def contained(font: re.Match[str]) -> str:
        return f"url(data:font/woff;base64,{base64.b64encode((style.parent / font[1]).read_bytes()).decode()})"

    return _FONT.sub(contained, style.read_text(encoding="utf-8"))


def _write_notebooks(root: Path, folder: Path) -> None:
    """The tutorials as notebooks that have not been run, to download."""
    pages = sorted((root / "docs" / "tutorials").glob("*.md"))
    if pages:
        import nbformat  # comes with the docs extra; pages without tutorials need it not

        from docs.tools.notebooks import notebook

        folder.mkdir()
        for tutorial in pages:
            nbformat.write(notebook(tutorial.read_text(encoding="utf-8")), folder / f"{tutorial.stem}.ipynb")


def _moved(link: re.Match[str], source: Path, root: Path, files: dict[Path, Path], broken: list[str]) -> str:
    """A link that holds in the tree, as it must be in the site; its words alone if its file is not in the site."""
    mark, words, target, anchor = link[1], link[2], link[3], link[4] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return link[0]
    path = Path(os.path.normpath(source.parent / target))
    if path in files:
        here = files[source].parent
        return f"{mark}[{words}]({Path(os.path.relpath(files[path], here)).as_posix()}{anchor})"
    if not (root / path).exists():
        broken.append(link[0])
    return words


def _configuration(root: Path, docs: Path) -> str:
    """The site's configuration, with the lines of navigation whose page is there."""
    lines = (root / "docs" / "zensical.toml").read_text(encoding="utf-8").splitlines(keepends=True)
    entry = re.compile(r'^\s*\{ "[^"]+" = "([^"]+\.md)" \},$')
    kept = [line for line in lines if (m := entry.match(line.rstrip())) is None or (docs / m[1]).is_file()]
    return "".join(kept).replace("@ROOT@", root.as_posix())


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)


def build(folder: Path = BUILD) -> None:
    """Make the site of what was assembled, without its cache and without a warning.

    Raises:
        subprocess.CalledProcessError: if Zensical warns of anything.
    """
    _zensical("build", "--strict", "--clean", folder=folder)


def _zensical(*words: str, folder: Path) -> None:
    # From the root, so that Zensical can import the extension `docs.tools.mathml`.
    command = [sys.executable, "-m", "zensical", *words, "--config-file", str(folder / "zensical.toml")]
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Build the documentation site into build/site.")
    parser.add_argument("--serve", action="store_true", help="show it on a local port as well")
    serve = parser.parse_args().serve
    assemble()
    try:
        _zensical("serve", folder=BUILD) if serve else build()
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)


if __name__ == "__main__":
    main()
