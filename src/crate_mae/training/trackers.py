"""TensorBoard, Weights & Biases and others, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import LoggerType

from crate_mae.errors import UserError
from crate_mae.training.options import RunOptions


def choose_trackers(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """The trackers to use: the one or those asked for; if nobody asked, TensorBoard where it is installed.

    Raises:
        UserError: for a tracker that Accelerate does not know or that is not installed.
    """
    if asked is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    asked = (asked,) if isinstance(asked, str) else tuple(asked)
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in asked:
        if name not in known:
            raise UserError(f"Unknown tracker {name}: --trackers takes {', '.join(known)}.")
        if importlib.util.find_spec(name) is None:
            extra = f"'crate-mae[{name}]'" if name in ("tensorboard", "wandb") else name
            raise UserError(f"The tracker {name} is not installed: pip install {extra}")
    return asked


def start_trackers(accelerator: Accelerator, config: RunOptions, run: Path, start_step: int) -> None:
    """Start the accelerator's trackers, and have TensorBoard forget what it was told beyond `start_step`."""
    if config.trackers:
        options = {"tensorboard": {"purge_step": start_step + 1}, "wandb": {"name": run.name}}
        accelerator.init_trackers("", init_kwargs={name: options.get(name, {}) for name in config.trackers})


def close_trackers(accelerator: Accelerator) -> None:
    """Have the trackers write down what they still hold."""
    for tracker in accelerator.trackers:
        tracker.finish()
