"""Telling other libraries of our models when they are imported, and not before.

timm and transformers find a model by name in a registry of their own, and look for no plug-ins. `import crate_mae` has
to put ours there, in whichever order the two are imported, and must not import timm or transformers to do so: that
takes seconds, and `crate-mae --help` and every program that never uses them would pay. So `import crate_mae` leaves a
note with Python's import system: when one of these modules has been imported, import the module of ours that registers
with it. Nothing else is changed, no file is looked for differently, and each note is taken down when it was used.
"""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(homes: Mapping[str, str]) -> None:
    """Import a module of ours once another module has been imported; at once, if it has been already.

    Args:
        homes: from the other module's name to that of ours.
    """
    for name, ours in homes.items():
        if name in sys.modules:
            _import(name, ours)
    waiting = {name: ours for name, ours in homes.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _Notes(waiting))


class _Notes:  # a finder; its base class `importlib.abc.MetaPathFinder` would double the time of `import crate_mae`
    """Finds modules as the finders after it do, and adds one step to the import of those that are waited for."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module that is waited for, whose loader then imports ours as well; else None."""
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._add_step(fullname, spec.loader)
        return spec

    def _add_step(self, name: str, loader: object) -> None:
        execute = loader.exec_module  # pyright: ignore[reportAttributeAccessIssue]  # every loader that has a spec

        def execute_then_import_ours(module: ModuleType) -> None:
            del loader.exec_module  # pyright: ignore[reportAttributeAccessIssue]  # the class's own shows again
            execute(module)
            if ours := self.waiting.pop(name, None):
                _import(name, ours)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = execute_then_import_ours  # pyright: ignore[reportAttributeAccessIssue]


def _import(name: str, ours: str) -> None:
    """Import ours. What is wrong with it must not take the other library down."""
    try:
        import_module(ours)
    except Exception as error:
        warnings.warn(f"{name} will not know the models of crate_mae: {error}", RuntimeWarning, stacklevel=2)
