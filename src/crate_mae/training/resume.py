"""Continue from a checkpoint: what may not change in a run, what may if the user allows it, and what is restored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from crate_mae.data.files import DIGESTS_FILE, write_whole
from crate_mae.errors import UserError
from crate_mae.models.checkpoints import STATE_FILE, newest_checkpoint
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.weights import read_config
from crate_mae.training import checkpoint
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.config import result_options
from crate_mae.training.images import HELD_OUT_DATA, data_digests
from crate_mae.training.model_state import ModelState
from crate_mae.training.options import RunOptions
from crate_mae.training.processes import first_decides
from crate_mae.training.run_directory import TABLES, RunDirectory
from crate_mae.training.task import Task

logger = logging.getLogger(__name__)


def continued(task: Task, newest: Path, *, data_changed: bool) -> RunOptions:
    """The configuration of a run that continues from a checkpoint; nothing has been written yet.

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
    state, _ = checkpoint.read_state(newest / STATE_FILE)
    before, epochs = state.images // task.config.batch_size, state.options.get("warmup_epochs")
    if not data_changed or epochs is None:
        return task.config
    if before != task.steps_per_epoch:
        epochs = round(epochs * before) / task.steps_per_epoch
    return replace(task.config, warmup_epochs=epochs)


def resume(
    task: Task,
    accelerator: Accelerator,
    model_state: ModelState,
    *,
    newest: Path | None,
    report: Callable[[str], object],
    data_changed: bool,
) -> TrainState:
    """Read the state to continue from, if there is one, and restore the files of the run to that state.

    Another run may have held the lock until now, so the newest checkpoint is looked for again. The data may be others
    than before if the user has said so.

    Raises:
        UserError: if no checkpoint is whole, or the options or the data have changed since the run started.
    """
    directory, train, held_out = task.directory, task.images.train, task.images.held_out
    data = first_decides(accelerator, lambda: data_digests(train, held_out, with_labels=task.learns_labels))
    notes: list[str] = []
    change: dict[str, Any] | None = None
    folder = first_decides(accelerator, lambda: newest_checkpoint(directory.path, notes.append, known=newest))
    if folder is None:
        state = TrainState()
    else:
        # Before the weights are read, which need not fit the model of other options.
        _refuse_other_options(checkpoint.read_state(folder / STATE_FILE)[0], task.config, data_changed=data_changed)
        state = checkpoint.read(folder, model_state)
        change = _data_change(state, task, data)
        if change and not data_changed:
            raise _changed_data_error(change, task.config)
        logger.info("Resuming from %s, which %d process(es) wrote.", folder, state.world_size)
    state.images, state.data, state.options = len(train), data, result_options(task.config)
    state.world_size = accelerator.num_processes
    for note in notes:
        report(note)
        state.kept_step = state.step
    if change and HELD_OUT_DATA.intersection(change["changed"]):
        state.best_step, state.best_score = 0, None  # scores on other images do not compare
    if accelerator.is_main_process:
        if folder is None:
            directory.cut_back(None)
        else:
            _go_back(directory, folder, state, report)
        _note_data(task, change, report)
    accelerator.wait_for_everyone()
    return state


def _refuse_other_options(state: TrainState, config: RunOptions, *, data_changed: bool) -> None:
    """Raise a `UserError` if options that decide the result are not those of a checkpoint; see `continued`."""
    then, now = state.options, result_options(config)
    if data_changed and "warmup_epochs" in then:
        now["warmup_epochs"] = then["warmup_epochs"]
    if changed := [f"{key}: {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]]:
        raise UserError(
            "config.yaml differs from the options that the run started with:\n  " + "\n  ".join(changed) + "\n"
            "Restore the original values, or start a new run with another --out."
        )


def _data_change(state: TrainState, task: Task, data: Mapping[str, str]) -> dict[str, Any] | None:
    """What data_changes.csv is to say if images or labels (their digests) are not those of a checkpoint; else None."""
    changed = [name for name, digest in data.items() if state.data.get(name, digest) != digest]
    images = len(task.images.train)
    if not changed and images == state.images:
        return None
    return {
        "step": state.step,
        "images_before": state.images,
        "images": images,
        "changed": changed or ["training images"],
    }


def describe_data_change(change: Mapping[str, Any]) -> str:
    """A sentence about a row of data_changes.csv."""
    return (
        f"From step {int(change['step']):,} the run has other data ({change['changed']}): {int(change['images']):,} "
        f"images to train on, {int(change['images_before']):,} before."
    )


def _changed_data_error(change: Mapping[str, Any], config: RunOptions) -> UserError:
    """The error to raise for data that has changed, if the user has not said that this is meant."""
    if change["images"] != change["images_before"]:
        kind = "fewer" if change["images"] < change["images_before"] else "more"
        what = f"This run trains on {change['images_before']:,} images, but there are {kind} in its data now."
    else:
        what = (
            f"The {' and the '.join(change['changed'])} have changed since this run started (names, contents or "
            "classes), although their number is the same."
        )
    how = "" if config.is_from_python else f"To continue with the current data: {config.resume_with_other_data}\n"
    return UserError(f"{what}\n{how}Otherwise put the data back as it was, or start a new run with another --out.")


def _go_back(directory: RunDirectory, folder: Path, state: TrainState, report: Callable[[str], object]) -> None:
    """Have the files of the run be as they were at a checkpoint.

    Checkpoints from before there were digests have no tables: rows after their step are removed.
    """
    has_tables = (folder / DIGESTS_FILE).exists()
    directory.cut_back(state.step, tables=not has_tables)
    for name in TABLES if has_tables else ():
        if (folder / name).is_file():
            write_whole(directory.path / name, (folder / name).read_bytes())
        else:
            (directory.path / name).unlink(missing_ok=True)
    write_whole(directory.checkpoints / "last", f"{folder.name}\n")
    checkpoint.forget_damaged_best(directory.path, state, report, known=folder)


def _note_data(task: Task, change: Mapping[str, Any] | None, report: Callable[[str], object]) -> None:
    """Record which images are held out, and from which step the run continues with other images than before.

    Of unreadable images, those that are no longer in the data do not count any more.
    """
    directory, record = task.directory, task.images.split
    is_known = directory.held_out_file.exists()
    if change is not None:
        row = {**change, "changed": ", ".join(change["changed"])}
        directory.data_changes.append([row])
        report(describe_data_change(row))
        if record is not None and not is_known:
            report("This run does not say which images it held out: some that are now were trained on before.")
        parts = task.images.train, task.images.held_out
        present = {part.location(i) for part in parts for i in range(len(part))}
        kept = [row for row in directory.bad_files.read() if row["location"] in present]
        directory.bad_files.cut_back(None)
        directory.bad_files.append(kept)
    if record is not None and (change is not None or not is_known):
        write_whole(directory.held_out_file, json.dumps(record()) + "\n")
