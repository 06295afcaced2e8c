"""Checkpoints: everything needed to go on exactly, in safetensors and JSON, never a pickle.

A checkpoint folder is a MODEL like any other: the model that the run measures. Where that is a running average of the
weights, the weights themselves, from which training goes on, stand beside it. All names are those of the unwrapped
model, so a run may go on with another number of processes than it began with.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from crate_mae.data.files import write_whole
from crate_mae.errors import UserError
from crate_mae.models.tensors import misfits, read_tensors
from crate_mae.models.weights import WEIGHTS_FILE, Config, newest_checkpoint, save_tensors
from crate_mae.training.files import whole_folder
from crate_mae.training.trainee import Trainee

logger = logging.getLogger(__name__)

SCHEMA = 1
TRAINED_FILE = "trained.safetensors"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainState:
    """How far a run has come, besides weights and optimizer.

    Attributes:
        step: optimizer steps behind us, skipped ones included.
        skipped: steps skipped because of a loss or gradient that was not finite.
        skipped_in_a_row: how many of them came last.
        loss_sum: sum of the losses since the last row of metrics.csv,
        loss_count: and their number.
        images: training images, which must not change under a run.
        world_size: processes.
        best_step: the step of the best model so far, where models are compared,
        best_score: and its score.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    images: int = 0
    world_size: int = 1
    best_step: int = 0
    best_score: float | None = None

    def note_score(self, score: float | None) -> bool:
        """Whether this step has the best score so far; of equal ones the first is the best."""
        is_best = score is not None and (self.best_score is None or score > self.best_score)
        if is_best:
            self.best_step, self.best_score = self.step, score
        return is_best

    def count(self, loss: float, is_finite: bool) -> None:
        """Count one step."""
        self.step += 1
        if is_finite:
            self.skipped_in_a_row = 0
            self.loss_sum += loss
            self.loss_count += 1
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state of a moment, gathered from all processes; empty on all but the first.

    Attributes:
        weights: that are trained.
        optimizer: its state.
        average: of the weights; None if the run keeps none.
    """

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None = None

    @property
    def measured(self) -> dict[str, Any]:
        """The weights that the run measures: the average if there is one."""
        return self.weights if self.average is None else self.average


def gather(trainee: Trainee) -> Snapshot:
    """Collect what a checkpoint holds from a plain or a distributed model. All processes must call this together."""
    # An optimizer that has not stepped yet has no state; torch would invent one, by a step with zero gradients.
    states = {}
    if trainee.optimizer.state:
        states = get_optimizer_state_dict(trainee.model, trainee.optimizer, options=_WHOLE)
    average = None if trainee.average is None else get_model_state_dict(trainee.average.module, options=_WHOLE)
    return Snapshot(get_model_state_dict(trainee.model, options=_WHOLE), states, average)


def write(checkpoints: Path, snapshot: Snapshot, config: Config, state: TrainState) -> Path:
    """Write a checkpoint and name it the last one, and the best one if it is.

    Removed are all others but the best, and the one that was last before.
    """
    folder, before = checkpoints / f"step-{state.step}", newest_checkpoint(checkpoints.parent)
    with whole_folder(folder) as temporary:
        save_tensors(snapshot.measured, config, temporary)
        if snapshot.average is not None:
            save_file(snapshot.weights, temporary / TRAINED_FILE)
        moments = {
            f"{parameter}.{key}": value.contiguous()
            for parameter, values in snapshot.optimizer.get("state", {}).items()
            for key, value in values.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        groups = snapshot.optimizer.get("param_groups", [])
        content = {"schema": SCHEMA, **dataclasses.asdict(state), "parameter_groups": groups}
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kept = [folder, before]
    if state.best_score is not None:
        kept.append(checkpoints / f"step-{state.best_step}")
        write_whole(checkpoints / "best", f"step-{state.best_step}\n".encode())
    write_whole(checkpoints / "last", f"{folder.name}\n".encode())
    for other in (*checkpoints.glob("step-*"), *checkpoints.glob(".step-*")):  # ".": cut short by a kill
        if other not in kept:
            shutil.rmtree(other)
    logger.info("Saved %s.", folder)
    return folder


def read(folder: Path, trainee: Trainee) -> TrainState:
    """Put a checkpoint into a model, its optimizer and its average.

    Raises:
        UserError: if a file is missing or damaged, or belongs to another model.
    """
    state, groups = _read_state(folder / "state.json")
    trained = WEIGHTS_FILE if trainee.average is None else TRAINED_FILE
    _read_weights(folder / trained, trainee.model)
    if trainee.average is not None:
        _read_weights(folder / WEIGHTS_FILE, trainee.average.module)
    moments: dict[str, Any] = defaultdict(dict)
    for name, value in read_tensors(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        moments[parameter][key] = value
    if moments:
        states = {"state": moments, "param_groups": groups}
        try:
            set_optimizer_state_dict(trainee.model, trainee.optimizer, states, options=_WHOLE)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds the optimizer of another model, or is damaged: {error}.") from error
    return state


def _read_weights(path: Path, model: nn.Module) -> None:
    weights: dict[str, Any] = {**read_tensors(path)}
    # Ranks other than the first hold an empty `wanted`; the first speaks for all.
    wanted: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    if wanted and (problems := misfits(weights, wanted)):
        raise UserError(f"{path} holds the weights of another model: {problems}.")
    set_model_state_dict(model, weights, options=_WHOLE)


def _read_state(path: Path) -> tuple[TrainState, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, groups = content.pop("schema"), content.pop("parameter_groups")
        if schema != SCHEMA:
            raise UserError(f"{path} was written by another version of crate-mae (its schema is {schema}).")
        return TrainState(**content), groups
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so the run cannot go on from there: {error}.\n"
            f"If {path.parent.parent} holds another checkpoint, write its name into the file `last` beside it."
        ) from error


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step-"))
