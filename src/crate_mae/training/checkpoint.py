"""Checkpoints: everything needed to continue exactly, in safetensors and JSON, never a pickle.

A checkpoint folder is a MODEL like any other: the model that the run measures. Where that is a running average of the
weights, the weights themselves, from which training continues, are saved beside it. Names are those of the unwrapped
model, so a run may continue with another number of processes than it began with, sharded or not.

Of a sharded model each process writes a file of its own: not its slices, but a share of the tensors, each of them
whole. Tensors are gathered one after another, so that no process ever holds more than its share and one tensor; and
the files, with an index, are those in which Hugging Face splits large models. Slices would avoid the gathering, which
takes about as much traffic as a forward pass, but only programs that know the sharding could read them.

SHA256SUMS holds a digest of every file, with which `models.checkpoints` finds the newest checkpoint that is whole. The
tables of the run are copied into each checkpoint, from which a resumed run takes them back.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from crate_mae.data.documents import read_json
from crate_mae.data.files import (
    file_digest,
    flush_to_disk,
    set_usual_mode,
    whole_folder,
    write_digests,
    write_whole,
)
from crate_mae.errors import DivergedError, UserError
from crate_mae.models.checkpoints import (
    STATE_FILE,
    checkpoint_at,
    damage_of_checkpoint,
    is_checkpoint,
    list_checkpoints,
    named_checkpoint,
)
from crate_mae.models.config import CONFIG_FILE, WEIGHTS_FILE, Config
from crate_mae.models.tensors import has_tensors, index_of, read_tensors, refuse_other_tensors, stream_tensors
from crate_mae.models.weights import save_config, save_tensors
from crate_mae.training.model_state import WHOLE, ModelState, own_part, shard_like, whole_tensor, whole_weights
from crate_mae.training.processes import all_succeed, first_decides
from crate_mae.training.run_directory import TABLES, RunDirectory
from crate_mae.training.task import Task

logger = logging.getLogger(__name__)

SCHEMA = 1
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_UNFINISHED = re.compile(r"\.step-\d+\.(tmp|former)")  # of a process that was killed while it wrote a checkpoint


@dataclass
class TrainState:
    """The progress of a run, besides weights and optimizer.

    Attributes:
        step: optimizer steps so far, skipped ones included.
        skipped: steps skipped because of a loss or gradient that was not finite.
        skipped_in_a_row: number of steps skipped since the last one that was not.
        loss_sum: sum of the losses since the last row of metrics.csv.
        loss_count: number of losses in `loss_sum`.
        images: number of training images.
        data: digests of the training images, the held-out images and the labels. A run whose images have changed is
            refused without `--data-changed`.
        options: the options that determine the result.
        kept_step: the step of a checkpoint that is kept besides the usual ones: the one that the run went back to when
            others were damaged or missing. A disk that has damaged one may damage the next.
        world_size: number of processes.
        best_step: step of the best model so far; 0 if the run does not compare models.
        best_score: score of the model of `best_step`; None if there is none.
        seconds: time that the run took up to its last checkpoint, over all its starts.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    images: int = 0
    data: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    kept_step: int = 0
    world_size: int = 1
    best_step: int = 0
    best_score: float | None = None
    seconds: float = 0.0

    def note_score(self, score: float | None) -> bool:
        """Note the score of this step; return whether it is the best so far. Of equal ones the first is the best."""
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


# Tensors by file, and the groups of the optimizer's parameters. A process writes all tensors or, sharded, its share.
Snapshot = tuple[dict[str, dict[str, Any]], list[Any]]


def gather(model_state: ModelState) -> Snapshot:
    """Collect weights and optimizer state at one step. All processes must call this together."""
    options = _options(model_state)
    # An optimizer that has not stepped yet has no state; torch would invent one, by a step with zero gradients.
    states: dict[str, Any] = {}
    if model_state.optimizer.state:
        states = get_optimizer_state_dict(model_state.model, model_state.optimizer, options=options)
    weights = get_model_state_dict(model_state.model, options=options)
    files: dict[str, dict[str, Any]] = {WEIGHTS_FILE: weights}
    if model_state.average is not None:
        average = get_model_state_dict(model_state.average.module, options=options)
        files = {WEIGHTS_FILE: average, TRAINED_FILE: weights}
    files[OPTIMIZER_FILE] = {
        f"{parameter}.{key}": value.contiguous()
        for parameter, values in states.get("state", {}).items()
        for key, value in values.items()
    }
    return files, states.get("param_groups", [])


def write(checkpoints: Path, snapshot: Snapshot, config: Config, state: TrainState) -> Path:
    """Write a checkpoint of a whole model, from one process, and name it the last one, and the best one if it is.

    All others are removed, except the best, the one that was last before, and the one that the run went back to.
    """
    folder, (files, groups) = checkpoint_at(checkpoints, state.step), snapshot
    with whole_folder(folder) as temporary:
        save_config(config, temporary)
        for file, tensors in files.items():
            save_file(tensors, temporary / file, metadata={"format": "pt"})
        _write_rest(temporary, groups, state)
    _name_last(folder, state)
    return folder


def write_parts(
    accelerator: Accelerator, checkpoints: Path, snapshot: Snapshot, config: Config, state: TrainState
) -> None:
    """`write` of a sharded model: each process writes its part. All processes must call this together.

    Raises:
        UserError: if one of them cannot, or not into the same folder; then nothing is left of the checkpoint.
    """
    folder, (files, groups) = checkpoint_at(checkpoints, state.step), snapshot
    rank, processes = accelerator.process_index, accelerator.num_processes
    holders = {file: assign_tensors(tensors, processes) for file, tensors in files.items()}
    own = {file: _own_tensors(tensors, holders[file], rank) for file, tensors in files.items()}
    with ExitStack() as stack:

        def begin() -> Path:
            temporary = stack.enter_context(whole_folder(folder))
            save_config(config, temporary)
            return temporary

        temporary = first_decides(accelerator, begin)

        def write_part() -> dict[str, str]:
            if not (temporary / CONFIG_FILE).is_file():
                raise UserError(f"{checkpoints} is not the same folder on all machines: give an --out that they share.")
            paths = [part_file(temporary / file, rank, processes) for file in own]
            for path, tensors in zip(paths, own.values(), strict=True):
                save_file(tensors, path, metadata={"format": "pt"})
                set_usual_mode(temporary, path)  # by its owner
                flush_to_disk(path)
            return {path.name: file_digest(path) for path in paths}

        digests = all_succeed(accelerator, write_part)

        def complete() -> None:
            for file, holder in holders.items():
                write_index(temporary / file, holder, processes)
            known = {name: digest for part in digests for name, digest in part.items()}
            _write_rest(temporary, groups, state, known)
            stack.close()  # the folder takes its name
            _name_last(folder, state)

        first_decides(accelerator, complete)


def _own_tensors(tensors: Mapping[str, Tensor], holder: Mapping[str, int], rank: int) -> dict[str, Tensor]:
    """The tensors that a process holds in a checkpoint, each of them whole. All processes must call this together."""
    own = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if holder[name] == rank:
            own[name] = whole.cpu().contiguous()
    return own


def _write_rest(folder: Path, groups: list[Any], state: TrainState, known: Mapping[str, str] | None = None) -> None:
    """Write the state, the tables of the run, and digests of all files, as far as they are not known."""
    content = {"schema": SCHEMA, **dataclasses.asdict(state), "parameter_groups": groups}
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    run = folder.parent.parent
    for name in TABLES:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    write_digests(folder, [path.name for path in folder.iterdir()], known=known)


def _name_last(folder: Path, state: TrainState) -> None:
    checkpoints = folder.parent
    kept = [folder, named_checkpoint(checkpoints.parent), checkpoint_at(checkpoints, state.kept_step)]
    if best := best_checkpoint(checkpoints.parent, state):
        kept.append(best)
        write_whole(checkpoints / "best", f"{best.name}\n")
    write_whole(checkpoints / "last", f"{folder.name}\n")
    for other in list(checkpoints.iterdir()):
        if other not in kept and (is_checkpoint(other) or _UNFINISHED.fullmatch(other.name)):
            shutil.rmtree(other)
    logger.info("Saved %s.", folder)


def read(folder: Path, model_state: ModelState) -> TrainState:
    """Put a checkpoint into a model, its optimizer and its average.

    Raises:
        UserError: if a file is missing or damaged, or belongs to another model.
    """
    state, groups = read_state(folder / STATE_FILE)
    trained = WEIGHTS_FILE if model_state.average is None else TRAINED_FILE
    _read_weights(folder / trained, model_state.model, model_state)
    if model_state.average is not None:
        _read_weights(folder / WEIGHTS_FILE, model_state.average.module, model_state)
    examples = dict(model_state.plain.named_parameters())
    moments: dict[str, Any] = defaultdict(dict)
    for name, value in stream_tensors(folder / OPTIMIZER_FILE):
        parameter, _, key = name.rpartition(".")
        moments[parameter][key] = shard_like(value, examples.get(parameter))
    if moments:
        states = {"state": moments, "param_groups": groups}
        try:
            set_optimizer_state_dict(model_state.model, model_state.optimizer, states, options=_options(model_state))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds the optimizer of another model, or is damaged: {error}.") from error
    return state


def _options(model_state: ModelState) -> StateDictOptions | None:
    """The form in which torch reads and returns the state of a model: by parts if it is sharded, else whole."""
    return None if model_state.is_sharded else WHOLE


def _read_weights(path: Path, model: nn.Module, model_state: ModelState) -> None:
    # Of whole models, ranks other than the first hold an empty `wanted`; the first checks for all.
    wanted: dict[str, Any] = get_model_state_dict(model, options=_options(model_state))
    weights: dict[str, Any] = {name: shard_like(value, wanted.get(name)) for name, value in stream_tensors(path)}
    if wanted:
        refuse_other_tensors(weights, wanted, str(path), "the run trains")
    set_model_state_dict(model, weights, options=_options(model_state))


def read_state(path: Path) -> tuple[TrainState, list[Any]]:
    """The state in a file, and the groups of the optimizer's parameters.

    Raises:
        UserError: if it is damaged.
    """
    try:
        content = read_json(path)
        schema, groups = content.pop("schema"), content.pop("parameter_groups")
        if schema != SCHEMA:
            raise UserError(f"{path} was written by another version of crate-mae (its schema is {schema}).")
        return TrainState(**content), groups
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, so the run cannot continue from there: {error}.") from error


def diverged(run: Path, what: str) -> DivergedError:
    """The error to raise when a run did not stay finite; its first sentence says what did not, and when."""
    whole = (folder for folder in list_checkpoints(run) if damage_of_checkpoint(folder) is None)
    good = next(filter(_is_finite, whole), "none: the run had only begun")
    return DivergedError(
        f"{what}\n"
        f"The last good checkpoint is {good}.\n"
        "Start a new run with a lower --lr, a longer --warmup-epochs, or --precision float32."
    )


def _is_finite(folder: Path) -> bool:
    """Whether all weights of a checkpoint are finite."""
    files = [folder / file for file in (WEIGHTS_FILE, TRAINED_FILE) if has_tensors(folder / file)]
    return all(tensor.isfinite().all() for file in files for _, tensor in stream_tensors(file))


def assign_tensors(tensors: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """Assign tensors to processes: each in turn to the process that holds the fewest numbers so far."""
    held = [0] * processes
    holder: dict[str, int] = {}
    for name, tensor in tensors.items():
        holder[name] = held.index(min(held))
        held[holder[name]] += tensor.numel()
    return holder


def part_file(path: Path, process: int, processes: int) -> Path:
    """The part of a file that a process writes: `model-00001-of-00002.safetensors`."""
    return path.with_name(f"{path.stem}-{process + 1:05}-of-{processes:05}{path.suffix}")


def write_index(path: Path, holder: Mapping[str, int], processes: int) -> None:
    """Write the index of a file in parts: which part holds which tensor.

    Raises:
        UserError: if a part is missing.
    """
    parts = [part_file(path, process, processes) for process in range(processes)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{', '.join(missing)} did not appear in {path.parent}.\nGive an --out that all machines share."
        )
    names = {name: parts[process].name for name, process in holder.items()}
    size = sum(part.stat().st_size for part in parts)
    content = {"metadata": {"total_size": size}, "weight_map": names}
    index_of(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Saver:
    """Writes checkpoints of one model, by the clock and by epochs."""

    def __init__(self, task: Task, model_state: ModelState, accelerator: Accelerator) -> None:
        self.task = task
        self.directory = task.directory
        self.model_state = model_state
        self.accelerator = accelerator
        self._saved_at = time.monotonic()

    def is_due_by_clock(self) -> bool:
        """Whether the last checkpoint is old; clocks differ, so the answer of the first process counts for all."""
        return time.monotonic() - self._saved_at >= 60 * self.task.config.checkpoint_minutes

    def is_due_by_epoch(self, state: TrainState) -> bool:
        """Whether this step ends an epoch after which to save, or the run."""
        config = self.task.config
        is_end = state.step % (config.checkpoint_epochs * self.task.steps_per_epoch) == 0
        return is_end or state.step == config.steps

    def save(self, state: TrainState) -> None:
        """Write a checkpoint. All processes must call this together.

        Raises:
            DivergedError: if weights are not finite. Such a checkpoint would take the place of a good one.
        """
        check_state(self.accelerator, self.model_state, self.directory, state.step)
        snapshot, config = gather(self.model_state), self.task.model.config
        folder = self.directory.checkpoints
        if self.model_state.is_sharded:
            write_parts(self.accelerator, folder, snapshot, config, state)
        else:
            first_decides(self.accelerator, lambda: write(folder, snapshot, config, state))
        self._saved_at = time.monotonic()

    def save_model(self, state: TrainState) -> None:
        """Write the finished model, which marks the run as finished. All processes must call this together.

        It is the best one where models were compared, and otherwise the last one.
        """
        last, config = whole_weights(self.model_state.kept), self.task.model.config

        def write_best() -> None:
            self.directory.check_present()
            forget_damaged_best(self.directory.path, state, logger.warning)
            best = best_checkpoint(self.directory.path, state)
            tensors = last if best is None else read_tensors(best / WEIGHTS_FILE)
            save_tensors(tensors, config, self.directory.path)

        first_decides(self.accelerator, write_best)


def check_state(accelerator: Accelerator, model_state: ModelState, directory: RunDirectory, step: int) -> None:
    """Check that a model can be measured or saved. All processes must call this together.

    Raises:
        DivergedError: if weights are not finite, in the processes that hold them; a `UserError` in the others.
        UserError: if the run's folder is gone.
    """
    kept = [model_state.plain, *([] if model_state.average is None else [model_state.average.module])]
    finite = all(own_part(value).isfinite().all() for model in kept for value in model.state_dict().values())

    def check() -> None:
        directory.check_present()
        if not finite:
            raise diverged(directory.path, f"The weights are not finite after step {step}.")

    all_succeed(accelerator, check)


def best_checkpoint(run: Path, state: TrainState) -> Path | None:
    """The checkpoint with the best score; None where models are not compared."""
    return None if state.best_score is None else checkpoint_at(run / "checkpoints", state.best_step)


def forget_damaged_best(
    run: Path, state: TrainState, report: Callable[[str], object], *, known: Path | None = None
) -> None:
    """If the best checkpoint, unless it is `known` to be whole, is damaged or missing, report that and forget it."""
    best = best_checkpoint(run, state)
    if best is None or best == known:
        return
    damage = damage_of_checkpoint(best) if best.is_dir() else "it is missing"
    if damage is not None:
        report(f"{best}, the best checkpoint, is damaged: {damage}. The best of those from here on takes its place.")
        state.best_step, state.best_score = 0, None
