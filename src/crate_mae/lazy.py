"""Public names of a package that are imported when they are first used."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def lazy_package(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose modules are slow to import (PEP 562).

    The names are stated once, in the stub `__init__.pyi` of the package, as `from MODULE import NAME as NAME`. Type
    checkers read the same stub. `package` and `file` are the package's `__name__` and `__file__`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module is not None]
    modules = {alias.name: str(node.module) for node in imports for alias in node.names}

    def getattr_of_package(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return getattr_of_package, lambda: sorted(modules), sorted(modules)
