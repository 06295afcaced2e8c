"""The code beside exported weights, with which transformers opens them where this library is not installed.

`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` imports the file that `auto_map` in `config.json` names, and
files beside it that this imports. They are copies of this library's own: `write_code` takes the modules of
transformers' models and all that these import, gives them names without folders, since transformers looks into none,
and changes two things. Imports become relative; and annotations say `Tensor` where ours name shapes too, which takes
jaxtyping.
"""

import ast
import re
from functools import cache
from pathlib import Path

_PACKAGE = "crate_mae"
_ROOT = Path(__file__).parents[3]
_HERE = f"{_PACKAGE}.deployment.huggingface"
_SHAPED = re.compile(r'\b(?:Bool|Float|Int|Num|Shaped|UInt8)\[([\w.]+), *"[^"]*"\]')
_HEADER = "# Copied from the library crate-mae: not to be edited here.\n"

Import = ast.ImportFrom


def auto_map() -> dict[str, str]:
    """Entry of `config.json`: for each of transformers' automatic classes, a file and a class in it."""
    modeling, processing = (_flat_name(f"{_HERE}.{name}") for name in ("modeling", "processing"))
    return {
        "AutoConfig": f"{_flat_name(f'{_HERE}.configuration')}.CrateMAEConfig",
        "AutoModel": f"{modeling}.CrateMAEModel",
        "AutoModelForPreTraining": f"{modeling}.CrateMAEForPreTraining",
        "AutoModelForImageClassification": f"{modeling}.CrateMAEForImageClassification",
        "AutoBackbone": f"{modeling}.CrateMAEBackbone",
        "AutoImageProcessor": f"{processing}.CrateMAEImageProcessor",
    }


def write_code(folder: Path) -> None:
    """Write the modules that the models and their image processor need into a folder."""
    for name, text in _copies().items():
        (folder / name).write_text(text, encoding="utf-8")


@cache
def _copies() -> dict[str, str]:
    """The files of all modules that are needed, by name."""
    needed = _needed(f"{_HERE}.modeling") | _needed(f"{_HERE}.processing")
    texts = {module: _standalone(_path(module).read_text(encoding="utf-8"), needed) for module in needed}
    return {f"{_flat_name(module)}.py": _HEADER + text for module, text in texts.items()}


def _flat_name(module: str) -> str:
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def _path(module: str) -> Path:
    return _ROOT / f"{module.replace('.', '/')}.py"


def _needed(module: str) -> set[str]:
    """A module of ours, and those that are imported with it."""
    needed, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            body = ast.parse(_path(name).read_text(encoding="utf-8")).body
            waiting += [str(node.module) for node in body if isinstance(node, Import) and _is_ours(node)]
    return needed


def _is_ours(node: Import) -> bool:
    return str(node.module).split(".")[0] == _PACKAGE


def _standalone(text: str, copied: set[str]) -> str:
    """The text of a module, with imports of copies for those of this library, and without shapes."""
    lines = text.splitlines(keepends=True)
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, Import))
    for node in sorted(imports, key=lambda node: -node.lineno):
        if node.module == "jaxtyping":
            new = ""
        elif not _is_ours(node):
            continue
        else:
            new = " " * node.col_offset + _import(node, copied) + "\n"
        lines[node.lineno - 1 : node.end_lineno] = [new]
    return _SHAPED.sub(r"\1", "".join(lines))


def _import(node: Import, copied: set[str]) -> str:
    """Of what is not copied, imports inside functions stay, in a form in which transformers does not ask for them."""
    assert not any(alias.asname for alias in node.names)
    names = ", ".join(alias.name for alias in node.names)
    if node.module in copied:
        return f"from .{_flat_name(str(node.module))} import {names}"
    values = ", ".join(f'__import__("{node.module}", fromlist=["*"]).{alias.name}' for alias in node.names)
    return f"{names} = {values}"
