"""Names that a package imports when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for a package whose public names live in sub-modules that are heavy to import (PEP 562).

    Args:
        package: the package's `__name__`.
        homes: from public name to the sub-module, relative to the package, that defines it.
    """

    def getattr_of_package(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getattr_of_package
