"""Register the models with timm and transformers as soon as these are imported.

Both libraries look up a model by name in their own registry, and have no plug-ins. `import crate_mae` has to register
the models there, in either order of the two imports, without importing timm or transformers itself: that takes seconds,
which `crate-mae --help` and programs that use neither would pay. So it adds a finder to `sys.meta_path`, the only
global state that it changes. When one of the libraries is imported, the finder adds a step to that import: importing
the module of this library that registers the models. It searches for no file in another way, and removes itself when
nothing is left to register. The package wrapt has such post-import hooks too, and takes several times as long to import
as `crate_mae` does.
"""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(homes: Mapping[str, str]) -> None:
    """Import a module of this library after another module is imported; now, if it has been imported already.

    Args:
        homes: from the name of the other module to that of ours.
    """
    for name, ours in homes.items():
        if name in sys.modules:
            _import(name, ours)
    waiting = {name: ours for name, ours in homes.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _RegisteringFinder(waiting))


class _RegisteringFinder:  # without `importlib.abc.MetaPathFinder`, which would double the time of `import crate_mae`
    """Finds modules as the other finders do, and adds a step to the import of those in `waiting`."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module in `waiting`, whose loader then imports ours as well; else None."""
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
            del loader.exec_module  # pyright: ignore[reportAttributeAccessIssue]  # the class's own method is visible again
            execute(module)
            if ours := self.waiting.pop(name, None):
                _import(name, ours)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = execute_then_import_ours  # pyright: ignore[reportAttributeAccessIssue]


def _import(name: str, ours: str) -> None:
    """Import ours; an error in it must not break the import of the other library."""
    try:
        import_module(ours)
    except Exception as error:
        warnings.warn(f"{name} will not know the models of crate_mae: {error}", RuntimeWarning, stacklevel=2)
