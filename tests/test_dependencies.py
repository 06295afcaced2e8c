"""What the library imports is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="only Python 3.11 and later can read pyproject.toml")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}  # whose names differ from their modules'
NOT_IMPORTED = {"onnx", "onnxscript", "tensorboard", "wandb"}  # torch.onnx and accelerate import these


def names_of(requirements):
    return {re.match(r"[A-Za-z0-9_.-]+", requirement)[0] for requirement in requirements}


REQUIRED = names_of(PROJECT["dependencies"])
EXTRAS = {extra: names_of(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}
DOCS = EXTRAS.pop("docs")
EXTRAS.pop("dev")


def imported_packages(source):
    """Names of the packages that a file imports, ours and Python's own left out."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    roots = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"crate_mae"}
    return {PACKAGES.get(root, root) for root in roots}


@pytest.fixture(scope="module")
def imports():
    return {
        str(path.relative_to(ROOT)): imported_packages(path.read_text(encoding="utf-8"))
        for path in (ROOT / "src").rglob("*.py")
    }


def test_every_import_is_declared(imports):
    declared = REQUIRED.union(*EXTRAS.values())
    undeclared = {file: found - declared for file, found in imports.items() if found - declared}
    assert undeclared == {}, "add these packages to pyproject.toml"


def test_tools_of_the_documentation_import_what_its_extra_declares():
    declared = REQUIRED | DOCS | {"docs"}
    for path in (ROOT / "docs" / "tools").glob("*.py"):
        assert imported_packages(path.read_text(encoding="utf-8")) <= declared, path.name


def test_every_declared_package_is_imported(imports):
    imported = set().union(*imports.values()) | NOT_IMPORTED
    assert REQUIRED.union(*EXTRAS.values()) - imported == set(), "remove these packages from pyproject.toml"


def test_the_app_declares_what_only_it_imports(imports):
    own = set().union(*(found for file, found in imports.items() if file.startswith("src/crate_mae/app/")))
    assert own - REQUIRED == EXTRAS["app"]


def test_dev_installs_every_extra_that_tests_import():
    assert EXTRAS["app"] | EXTRAS["hf"] | EXTRAS["hub"] | EXTRAS["onnx"] <= names_of(
        PROJECT["optional-dependencies"]["dev"]
    )


def test_an_undeclared_import_would_be_seen():
    assert imported_packages("import os\nimport numpy.linalg\nfrom PIL import Image\nimport crate_mae") == {
        "numpy",
        "pillow",
    }
