"""Imports point down the layers only."""

import ast
from pathlib import Path

import pytest

import crate_mae

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "crate_mae"

# Each layer, and the layers that it may import. Those without a folder, `errors` to `terminal`, are for all.
LAYERS = {
    "theory": set(),
    "models": {"theory", "data"},
    "data": set(),
    "drawing": set(),
    "training": {"models", "data", "theory", "drawing"},
    "evaluation": {"models", "data"},
    "interpret": {"theory", "models", "data", "evaluation", "drawing"},
    "costs": {"models", "training"},
    "comparison": {"theory", "models", "data", "training", "evaluation", "drawing", "costs"},
    "app": {"theory", "models", "data", "evaluation", "interpret", "drawing"},
    "deployment": {"theory", "models", "data", "drawing"},
    "commands": {"theory", "models", "data", "training", "evaluation", "interpret", "comparison", "costs", "drawing"}
    | {"app", "deployment"},
    "cli": {"theory", "models", "data", "training", "evaluation", "comparison", "commands"},
    "__main__": {"cli"},
    "__init__": {"theory", "models", "data", "training", "evaluation", "commands"},
    "errors": set(),
    "lazy": set(),
    "options": set(),
    "timm": {"models"},
    "hf": {"deployment"},
    "private_torch": set(),
    "terminal": set(),
}
HEAVY = {"torch", "torchvision", "timm", "accelerate", "sklearn", "torchmetrics", "matplotlib", "numpy", "pyarrow"}
LIGHT = {"commands", "cli", "__main__", "__init__", "errors", "lazy", "options"}  # for a fast `crate-mae --help`
OPTIONAL = {
    "datasets",
    "tensorboard",
    "wandb",
    "gradio",
    "fastapi",
    "uvicorn",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pillow_heif",
}
NEEDED = {"app": {"gradio", "fastapi", "uvicorn"}}  # the layer cannot do without these; only its command imports it


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_in(node):
    """(module, whether it is imported with the file rather than inside a function) for every import below a node."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [(alias.name, True) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute, so that they can be read"
            found.append((child.module, True))
        else:
            inside = (
                isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or "TYPE_CHECKING" in ast.dump(child)[:80]
            )
            found += [(module, at_top and not inside) for module, at_top in imports_in(child)]
    return found


def violations(path, source):
    layer = layer_of(path)
    for module, at_top in imports_in(ast.parse(source)):
        root, *rest = module.split(".")
        if root == "crate_mae":
            target = rest[0] if rest else "__init__"  # the package itself, which gives access to every layer
            if target not in LAYERS[layer] | {layer, "errors", "lazy", "options", "private_torch", "terminal"}:
                yield f"{layer} imports {module}, which is not below it"
        if root in OPTIONAL - NEEDED.get(layer, set()) and at_top:
            yield f"{module} is optional, and is imported with the file"
        if root in HEAVY and at_top and layer in LIGHT:
            yield f"{module} is heavy, and is imported with the file"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_point_down(path):
    assert list(violations(path, path.read_text(encoding="utf-8"))) == []


def test_no_folder_hides_a_public_name():
    """`import crate_mae.export`, were it a folder, would put a module where `crate_mae.export` was a function."""
    assert not set(crate_mae.__all__) & {path.stem for path in PACKAGE.iterdir()}


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("theory/x.py", "from crate_mae.models.layers import ISTA"),
        ("data/x.py", "def f():\n    import crate_mae.models"),
        ("theory/x.py", "from crate_mae import models"),
        ("theory/x.py", "import crate_mae"),
        ("evaluation/x.py", "from crate_mae.training.options import PretrainOptions"),
        ("evaluation/x.py", "from crate_mae.comparison.options import CompareOptions"),
        ("commands/x.py", "import torch"),
        ("data/x.py", "from datasets import load_dataset"),
        ("commands/x.py", "import gradio"),
        ("interpret/x.py", "from crate_mae.app import server"),
    ],
)
def test_an_upward_heavy_or_optional_import_would_be_found(where, source):
    assert list(violations(PACKAGE / where, source))
