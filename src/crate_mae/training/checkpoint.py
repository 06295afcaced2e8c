"""Checkpoints: everything needed to go on exactly, in safetensors and JSON, never a pickle.

A checkpoint folder is a MODEL like any other. All names are those of the unwrapped model, so a run may go on with
another number of processes than it began with.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from crate_mae.data.files import write_whole
from crate_mae.errors import UserError
from crate_mae.models.config import ModelConfig
from crate_mae.models.tensors import misfits, read_tensors
from crate_mae.models.weights import WEIGHTS_FILE, save_tensors
from crate_mae.training.files import whole_folder

logger = logging.getLogger(__name__)

SCHEMA = 1
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
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    images: int = 0
    world_size: int = 1

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
    """Weights and optimizer state of a moment, gathered from all processes; empty on all but the first."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]


def gather(model: nn.Module, optimizer: Optimizer) -> Snapshot:
    """Collect what a checkpoint holds from a plain or a distributed model. All processes must call this together."""
    # An optimizer that has not stepped yet has no state; torch would invent one, by a step with zero gradients.
    states = get_optimizer_state_dict(model, optimizer, options=_WHOLE) if optimizer.state else {}
    return Snapshot(get_model_state_dict(model, options=_WHOLE), states)


def write(checkpoints: Path, snapshot: Snapshot, config: ModelConfig, state: TrainState) -> Path:
    """Write a checkpoint, name it the last one, and remove all others but the one that was last before."""
    folder, before = checkpoints / f"step-{state.step}", newest_checkpoint(checkpoints.parent)
    with whole_folder(folder) as temporary:
        save_tensors(snapshot.weights, config, temporary)
        moments = {
            f"{parameter}.{key}": value.contiguous()
            for parameter, values in snapshot.optimizer.get("state", {}).items()
            for key, value in values.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        groups = snapshot.optimizer.get("param_groups", [])
        content = {"schema": SCHEMA, **dataclasses.asdict(state), "parameter_groups": groups}
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_whole(checkpoints / "last", f"{folder.name}\n".encode())
    for other in (*checkpoints.glob("step-*"), *checkpoints.glob(".step-*")):  # ".": cut short by a kill
        if other not in (folder, before):
            shutil.rmtree(other)
    logger.info("Saved %s.", folder)
    return folder


def newest_checkpoint(run: Path) -> Path | None:
    """The folder that `checkpoints/last` names; None before the first checkpoint.

    Raises:
        UserError: if that folder is gone.
    """
    last = run / "checkpoints" / "last"
    if not last.exists():
        return None
    name = last.read_text(encoding="utf-8").strip()
    folder = last.parent / name
    if not (re.fullmatch(r"step-\d+", name) and folder.is_dir()):
        raise UserError(
            f'{last} names the checkpoint "{name}", which is not there.\n'
            f"Write the name of another folder in {last.parent} into it, or delete the run and start anew."
        )
    return folder


def read(folder: Path, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """Put a checkpoint into a model and its optimizer.

    Raises:
        UserError: if a file is missing or damaged, or belongs to another model.
    """
    state, groups = _read_state(folder / "state.json")
    weights: dict[str, Any] = {**read_tensors(folder / WEIGHTS_FILE)}
    _check_names(folder / WEIGHTS_FILE, weights, get_model_state_dict(model, options=_WHOLE))
    moments: dict[str, Any] = defaultdict(dict)
    for name, value in read_tensors(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        moments[parameter][key] = value
    set_model_state_dict(model, weights, options=_WHOLE)
    if moments:
        try:
            set_optimizer_state_dict(model, optimizer, {"state": moments, "param_groups": groups}, options=_WHOLE)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds the optimizer of another model, or is damaged: {error}.") from error
    return state


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


def _check_names(path: Path, found: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    # Ranks other than the first hold an empty `wanted`; the first speaks for all.
    if wanted and (problems := misfits(found, wanted)):
        raise UserError(f"{path} holds the weights of another model: {problems}.")


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step-"))
