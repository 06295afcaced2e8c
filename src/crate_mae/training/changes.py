"""What may not change under a run, and what may if the user says so: its options never, its images with a note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crate_mae.errors import UserError
from crate_mae.models.checkpoints import STATE_FILE
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.weights import read_config
from crate_mae.training.checkpoint import TrainState, read_state
from crate_mae.training.config import changes_since
from crate_mae.training.images import is_python_object
from crate_mae.training.options import RunOptions
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.task import Task


def continued(task: Task, newest: Path, *, data_changed: bool) -> RunOptions:
    """The configuration of a run that goes on from a checkpoint; nothing has been written yet.

    With other data epochs may have another length: the warm-up keeps its length in steps.

    Raises:
        UserError: if the classes are others: the model has been built for those of before.
    """
    config, now = read_config(newest), task.model.config
    if isinstance(config, ClassifierConfig) and config.classes != now.classes:
        raise UserError(
            f"This run learns the classes {', '.join(config.classes)}, but its data now has {', '.join(now.classes)}.\n"
            "Put the classes back as they were, or start a new run with another --out."
        )
    state, _ = read_state(newest / STATE_FILE)
    before, epochs = state.images // task.config.batch_size, state.options.get("warmup_epochs")
    if not data_changed or epochs is None:
        return task.config
    if before != task.steps_per_epoch:
        epochs = round(epochs * before) / task.steps_per_epoch
    return replace(task.config, warmup_epochs=epochs)


def refuse_other_options(state: TrainState, config: RunOptions, *, data_changed: bool) -> None:
    """Raise a `UserError` if options that decide the result are not those of a checkpoint; see `continued`."""
    if data_changed and "warmup_epochs" in state.options:
        config = replace(config, warmup_epochs=state.options["warmup_epochs"])
    if changed := changes_since(state.options, config):
        raise UserError(
            "config.yaml has other options than the run began with:\n  " + "\n  ".join(changed) + "\n"
            "Write the first values into it again, or start a new run with another --out."
        )


def data_change(state: TrainState, task: Task, data: Mapping[str, str]) -> dict[str, Any] | None:
    """The row of data_changes.csv for images or labels that are not those of a checkpoint; None if they are the same.

    Args:
        state: of the checkpoint.
        task: with the data as it is now.
        data: digests of that.
    """
    changed = [name for name, digest in data.items() if state.data.get(name, digest) != digest]
    images = len(task.images.train)
    if not changed and images == state.images:
        return None
    return {
        "step": state.step,
        "images_before": state.images,
        "images": images,
        "changed": ", ".join(changed) or "training images",
    }


def describe_data_change(change: Mapping[str, Any]) -> str:
    """A sentence about a row of data_changes.csv."""
    return (
        f"From step {int(change['step']):,} the run has other data ({change['changed']}): {int(change['images']):,} "
        f"images to train on, {int(change['images_before']):,} before."
    )


def changed_data_error(change: Mapping[str, Any], config: RunOptions, directory: RunDirectory) -> UserError:
    """The error to raise for data that has changed, if the user has not said that this is meant."""
    if change["images"] != change["images_before"]:
        what = f"This run trains on {change['images_before']:,} images, but its data now has {change['images']:,}."
    else:
        what = (
            f"The {' and the '.join(change['changed'].split(', '))} are not those that this run began with, though "
            "their number is the same: other names, contents or classes."
        )
    go_on = (
        "" if is_python_object(config) else f"To go on with the data as it is now: {directory.resume_with_other_data}\n"
    )
    return UserError(f"{what}\n{go_on}Otherwise put the data back as it was, or start a new run with another --out.")
