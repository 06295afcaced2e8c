"""The checkpoints of a run: which there are, which of them are whole, and which is the newest whole one.

A checkpoint is whole if every file has the digest that was written beside it, in SHA256SUMS. Of checkpoints from before
there were digests, only what can be read quickly is checked: the headers of tensors and the documents.
"""

import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from crate_mae.data.documents import read_json
from crate_mae.data.files import DIGESTS_FILE, damage_of
from crate_mae.errors import UserError, first_line
from crate_mae.models.config import WEIGHTS_FILE
from crate_mae.models.tensors import has_tensors

_NAME = re.compile(r"step-(\d+)")
STATE_FILE = "state.json"


def checkpoint_at(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return checkpoints / f"step-{step}"


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, damaged or not, from the newest to the oldest; first the one that `last` names.

    Folders of other names, and those without the files of a checkpoint, are not ours.
    """
    folder = run / "checkpoints"
    try:
        found = [path for path in folder.iterdir() if is_checkpoint(path)]
    except OSError:  # no such folder
        return []
    named = named_checkpoint(run)
    return sorted(found, key=lambda path: (path == named, step_of(path)), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint and is one, damaged or not."""
    files = (STATE_FILE, DIGESTS_FILE, WEIGHTS_FILE)
    return _NAME.fullmatch(path.name) is not None and any((path / file).is_file() for file in files)


def named_checkpoint(run: Path, name: str = "last") -> Path | None:
    """The checkpoint that the file `checkpoints/last` names, or another such file; None if it names none that is there.

    Args:
        run: the run's folder.
        name: of the file: "last", or "best" for the checkpoint that did best on the validation images.
    """
    file = run / "checkpoints" / name
    try:
        step = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = file.parent / step
    return folder if _NAME.fullmatch(step) and is_checkpoint(folder) else None


def newest_checkpoint(
    run: Path, report: Callable[[str], object] = lambda _line: None, *, known: Path | None = None
) -> Path | None:
    """The newest whole checkpoint of a run: the one that `checkpoints/last` names, or else the newest other one.

    Args:
        run: the run's folder.
        report: is called with a line if the one that `last` names is missing or damaged, and another one is taken.
        known: a checkpoint that this function returned a moment ago, whose files are not read again.

    Returns:
        its folder; None before the first checkpoint.

    Raises:
        UserError: if there are checkpoints, or one is named, but none of them is whole.
    """
    folder = run / "checkpoints"
    damaged: list[str] = []
    if named_checkpoint(run) is None and (folder / "last").exists():
        damaged.append(f"{folder / 'last'} does not name a checkpoint that is there")
    for checkpoint in list_checkpoints(run):
        damage = None if checkpoint == known else damage_of_checkpoint(checkpoint)
        if damage is None:
            if damaged or named_checkpoint(run) is None:
                why = "; ".join(damaged) or f"{folder / 'last'} is missing"
                report(f"{why}. Continuing from {checkpoint.name}, the newest checkpoint that is whole.")
            return checkpoint
        damaged.append(f"{checkpoint} is damaged: {damage}")
    if not damaged:
        return None
    raise UserError(
        f"No checkpoint of {run} is whole:\n  " + "\n  ".join(damaged) + "\n"
        f"Put a whole copy of one back, or delete {folder} to start this run again from its beginning."
    )


def damage_of_checkpoint(folder: Path) -> str | None:
    """What is damaged in a checkpoint, as the beginning of a sentence; None if nothing is."""
    if (folder / DIGESTS_FILE).exists():
        return damage_of(folder)
    if not has_tensors(folder / WEIGHTS_FILE):
        return f"{WEIGHTS_FILE} is missing"
    try:
        for path in folder.glob("*.json"):
            read_json(path)
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                file.keys()
    except (UserError, OSError, SafetensorError) as error:
        return first_line(error).removesuffix(".")
    return None
