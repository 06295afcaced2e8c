"""Where a comparison keeps everything, so that a killed one goes on where it was.

DIR/
    comparison.yaml     all options, what was measured before the start, the plan that follows, machine and versions
    runs/MODEL/
        search-0.001/   runs of the search, each an ordinary run of `crate-mae pretrain`, named after its learning rate
        seed-0/         the final runs
    scores.json         what has been measured of the final runs and of the controls
    table.csv  table.md  figure.png  curves.png
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crate_mae.data.files import refuse_used_folder, write_whole
from crate_mae.errors import UserError

_HEADER = "# A comparison of crate-mae. The same command, given again, goes on with it.\n"


@dataclass(frozen=True)
class ComparisonDirectory:
    """The paths of a comparison, and its two notebooks."""

    path: Path

    @property
    def plan_file(self) -> Path:
        """Options, measurements and plan; a folder with this file is a comparison."""
        return self.path / "comparison.yaml"

    def search_run(self, model: str, rate: float) -> Path:
        """The run that tries a learning rate."""
        return self.path / "runs" / model / f"search-{rate:.3g}"

    def final_run(self, model: str, seed: int) -> Path:
        """The final run of a seed."""
        return self.path / "runs" / model / f"seed-{seed}"

    def existing(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """What `comparison.yaml` holds; None if the folder is free to use.

        Args:
            options: of the comparison that wants to go on here.

        Raises:
            UserError: if the folder holds something else, or a comparison with other options.
        """
        if not self.plan_file.exists():
            self._refuse_other_content()
            return None
        try:
            content = yaml.safe_load(self.plan_file.read_text(encoding="utf-8"))
            held = dict(content["options"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.plan_file} cannot be read as a comparison. Give a new folder with --out."
            ) from error
        keys = dict.fromkeys([*options, *held])
        changed = [f"{key}: {held.get(key)} -> {options.get(key)}" for key in keys if held.get(key) != options.get(key)]
        if changed:
            raise UserError(
                f"{self.path} holds a comparison with other options:\n  " + "\n  ".join(changed) + "\n"
                "To go on with it, give the same options; for a new comparison, give another --out."
            )
        return content

    def save_plan(self, content: dict[str, Any]) -> None:
        """Write `comparison.yaml`."""
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        write_whole(self.plan_file, (_HEADER + text).encode())

    def score(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured under a key; measured now if it has not been."""
        file = self.path / "scores.json"
        try:
            scores = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet, or damaged: only time is lost
            scores = {}
        if key not in scores:
            scores[key] = measure()
            write_whole(file, (json.dumps(scores, indent=2) + "\n").encode())
        return scores[key]

    def _refuse_other_content(self) -> None:
        refuse_used_folder(self.path, kind="a comparison", leftovers=(f".{self.plan_file.name}.",))
