"""Where a run keeps everything: plain files, each written whole or not at all.

RUN/
    config.yaml         which command made the run, and every option, resolved; `--config` of it repeats the run
    command.txt         the commands that started and resumed the run, one per line, with their times
    environment.json    versions, machine, devices and threads of the last start
    log.txt             what the library logged
    metrics.csv         loss, learning rate, speed and results on held-out images, by step
    layers.csv          of pretraining: sparsity and subspace rate of every layer: step, part, layer, measure, value
    bad_files.csv       unreadable images: step, location, reason
    data_changes.csv    steps from which the run continued with other images (`resume --data-changed`)
    held_out.json       which images pretraining holds out: numbers, and digests by which they are found again
    checkpoints/
        step-1200/      model.safetensors + config.json (a MODEL like any other)
                        optimizer.safetensors + state.json
                        trained.safetensors: if the model is an average, the weights that are averaged
                        metrics.csv, layers.csv, bad_files.csv, data_changes.csv: as they were at that step
                        SHA256SUMS: digests of all these files, as of the program sha256sum
        last            one line: the name of the newest complete checkpoint
        best            of fine-tuning: the name of the checkpoint with the best score on the validation images
    pictures/           of pretraining: step-1200.png: held-out images, masked, completed
    report.html         to look at while the run continues: curves, the newest picture, what the run is
    tensorboard/        if TensorBoard is installed
    model.safetensors   the finished model: of pretraining the last one, of fine-tuning the best one, with
    config.json         how it is built
    SHA256SUMS          digests of the files of a finished run, written last
    .lock               an operating-system lock is on it while a process writes here; the file itself stays
"""

from __future__ import annotations

import csv
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from crate_mae.data.documents import read_json, to_csv
from crate_mae.data.files import DIGESTS_FILE, damage_of, path_of, refuse_used_folder, write_digests, write_whole
from crate_mae.errors import UserError, first_line, installed_version
from crate_mae.models.checkpoints import list_checkpoints
from crate_mae.models.weights import load
from crate_mae.terminal import CleanFormatter
from crate_mae.training.config import load_config, to_yaml
from crate_mae.training.options import FinetuneOptions, PretrainOptions, RunOptions

if TYPE_CHECKING:
    from crate_mae.models.weights import Model


logger = logging.getLogger(__name__)

LEARNING = ("step", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "bad_images")
SPEED = ("images_per_second", "data_wait")
_PACKAGES = ("crate-mae", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors")
TABLES = ("metrics.csv", "layers.csv", "bad_files.csv", "data_changes.csv")
_FINAL = ("config.yaml", "environment.json", "model.safetensors", "config.json", "report.html", *TABLES)
_LEFT_BY_KILLED = re.compile(  # "lock": of earlier versions
    r"\.writing-\w{8}|\.(config\.yaml|[a-z_]+\.json|report\.html|SHA256SUMS|[a-z_]+\.csv)\.[0-9a-f]{8}|lock"
)
_PICTURE = re.compile(r"step-(\d+)\.png")
START, END = "Start: ", "End: "  # of lines in the log
LOCK_SECONDS = 10.0  # PyTorch's loader processes look every 5 s whether the process that started them is gone


class RunDirectory:
    """The paths of a run, as above, and what is written there besides checkpoints.

    A folder with `config_file` is a run. The content of `held_out_file` is made by `images.split_record`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"
        self.held_out_file = path / "held_out.json"
        self.layers = CsvLog(path / "layers.csv", ("step", "part", "layer", "measure", "value"))
        self.bad_files = CsvLog(path / "bad_files.csv", ("step", "location", "reason"))
        self.data_changes = CsvLog(path / "data_changes.csv", ("step", "images_before", "images", "changed"))

    def metrics(self, measures: Sequence[str] = ()) -> CsvLog:
        """One row per logged step; to write rows, give the measures of the task."""
        return CsvLog(self.path / "metrics.csv", (*LEARNING, *measures, *SPEED))

    def held_out(self) -> dict[str, Any] | None:
        """The content of `held_out_file`, if there is one.

        Raises:
            UserError: if it is damaged.
        """
        if not self.held_out_file.exists():
            return None
        found = read_json(self.held_out_file)
        if not isinstance(found, dict) or not {"images", "held_out", "sha256"} <= found.keys():
            raise UserError(f"{self.held_out_file} is damaged: it does not say which images are held out.")
        return found

    def picture(self, step: int) -> Path:
        """The picture of a step."""
        return self.path / "pictures" / f"step-{step}.png"

    def newest_picture(self) -> tuple[int, Path] | None:
        """The last picture, and its step; None if there is none."""
        steps = self._pictured_steps()
        return (max(steps), self.picture(max(steps))) if steps else None

    def _pictured_steps(self) -> list[int]:
        """The steps that have a picture; files of other names are not ours."""
        matches = [_PICTURE.fullmatch(path.name) for path in (self.path / "pictures").glob("step-*.png")]
        return [int(match[1]) for match in matches if match]

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its final model; of that, `config.json` is written last."""
        return (self.path / "config.json").exists()

    def why_unfinished(self) -> str | None:
        """Why a run that has its final model must be finished again; None if it is complete.

        SHA256SUMS is written last. Runs from before there were digests are complete without it.
        """
        if (self.path / DIGESTS_FILE).exists():
            return damage_of(self.path)
        has_digests = any((folder / DIGESTS_FILE).exists() for folder in list_checkpoints(self.path))
        return "it was ended while it wrote its last files" if has_digests else None

    def finish(self) -> None:
        """Write the digests of all files, which completes the run."""
        write_digests(self.path, [name for name in _FINAL if (self.path / name).is_file()])

    def check_present(self) -> None:
        """Raise a `UserError` if the folder was deleted or moved: it would be made again, without what was in it."""
        if not self.config_file.exists():
            raise UserError(
                f"The folder of the run, {self.path}, was deleted or moved, so the run has stopped.\n"
                "If it was moved, continue it in its new place: crate-mae resume NEW_PLACE"
            )

    def existing_config(self) -> PretrainOptions | FinetuneOptions | None:
        """The configuration of the run that is already here; None if the folder is free to use.

        Raises:
            UserError: if the path is a file, or a folder with something else in it.
        """
        if path_of("--out", self.config_file).exists():
            return load_config(self.config_file)
        refuse_used_folder(self.path, kind="a run of crate-mae", leftovers=("lock", ".lock", ".config.yaml."))
        return None

    @contextmanager
    def opened(self, config: RunOptions) -> Iterator[None]:
        """Create the folder if necessary, record this start, and keep other processes from writing meanwhile.

        Raises:
            UserError: if another process writes here, or the folder cannot be written; a new folder is removed again.
        """
        is_new = not self.path.exists()
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(self.path / ".lock"))
                self._remove_leftovers()
                write_whole(self.config_file, to_yaml(config))
                write_whole(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
                with (self.path / "command.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{datetime.now().isoformat(timespec='seconds')}  {shlex.join(sys.argv)}\n")
                self.checkpoints.mkdir(exist_ok=True)
                stack.enter_context(_logged_to(self.path / "log.txt"))
            except Timeout as error:  # the process that holds the lock writes here: even a new folder stays
                raise UserError(
                    f"{self.path} is being written by another run of crate-mae: wait for it, or stop it."
                ) from error
            except (OSError, UserError) as error:
                stack.close()
                if is_new:
                    shutil.rmtree(self.path, ignore_errors=True)
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"Cannot write into the folder {self.path}: {error.strerror}. Give another with --out."
                ) from error
            yield

    def _remove_leftovers(self) -> None:
        """Remove the temporary files and folders of processes that were killed."""
        for path in self.path.iterdir():
            if not _LEFT_BY_KILLED.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def log_start(self) -> None:
        """Begin the log of a process, and end that of one before it which was killed and could not."""
        text = (self.path / "log.txt").read_text(encoding="utf-8", errors="replace")
        if text.rfind(f"INFO {START}") > text.rfind(f"INFO {END}"):
            logger.info("%sunknown: the process before this one was killed, or its machine stopped.", END)
        logger.info("%s%s", START, shlex.join(sys.argv))

    def cut_back(self, step: int | None, *, tables: bool = True) -> None:
        """Forget what was logged after `step`, in tables only where asked; None forgets everything."""
        for table in (self.metrics(), self.layers, self.bad_files, self.data_changes) if tables else ():
            table.cut_back(step)
        for pictured in self._pictured_steps():
            if step is None or pictured > step:
                self.picture(pictured).unlink()


@dataclass(frozen=True)
class Run:
    """What `pretrain`, `finetune` and `resume` return: the run's folder, and its resolved options."""

    path: Path
    config: RunOptions

    def model(self) -> Model:
        """The finished model; of a run that is not finished, the model of its newest checkpoint.

        Raises:
            UserError: if the run has neither yet.
        """
        return load(self.path)

    def metrics(self) -> list[dict[str, float | None]]:
        """The rows of metrics.csv; a value that was not measured at a step is None.

        Raises:
            UserError: if the file is damaged.
        """
        table = RunDirectory(self.path).metrics()
        if damage := damage_of(self.path, [table.path.name]):
            raise UserError(f"{self.path}: {damage}.\nThis writes it again: {self.config.resume_command}")
        return numbers(table)


class CsvLog:
    """A table in a CSV file that grows by rows during a run.

    Rows are flushed as they come. The first column is the step: when a run resumes from a checkpoint, the rows
    after its step are removed, and so is a row that was half written when the process died. The file is created with
    the first row.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        assert columns[0] == "step", "rows are cut back by their step"
        self.path = path
        self.columns = tuple(columns)

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Add rows; a column that a row does not have stays empty. No value may hold a line break."""
        if not rows:
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(rows)

    def read(self) -> list[dict[str, str]]:
        """All complete rows, as text.

        Raises:
            UserError: if the file is not such a table.
        """
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8-sig")  # spreadsheets add a byte order mark
            rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restval=""))
            if not all(None not in row and row["step"].isdecimal() for row in rows):
                raise ValueError("it has rows of another form")
        except (ValueError, KeyError, csv.Error) as error:
            raise UserError(f"{self.path} is not a table of this run any more: {first_line(error)}.") from error
        return rows

    def widen(self) -> None:
        """Give a table of an earlier version the columns that it lacks; they stay empty in its rows."""
        rows = self.read()
        if rows and rows[0].keys() != set(self.columns):
            self.columns = (*self.columns, *(name for name in rows[0] if name not in self.columns))
            self._replace(rows, self.columns)

    def _replace(self, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
        write_whole(self.path, to_csv(columns, ([row.get(name) for name in columns] for row in rows)))

    def cut_back(self, step: int | None) -> None:
        """Keep the rows up to and including `step`, with the columns that they have; None keeps nothing."""
        if not self.path.exists():
            return
        kept = [row for row in self.read() if step is not None and int(row["step"]) <= step]
        if kept:
            self._replace(kept, list(kept[0]))
        else:
            self.path.unlink()


def numbers(table: CsvLog) -> list[dict[str, float | None]]:
    """The rows of a table of numbers; an empty cell is None.

    Raises:
        UserError: if the file is not such a table.
    """
    rows = table.read()
    try:
        return [{key: float(value) if value else None for key, value in row.items()} for row in rows]
    except ValueError as error:
        raise UserError(f"{table.path} holds something else than numbers: {error}.") from error


def environment() -> dict[str, Any]:
    """Versions and machine, which are needed to repeat a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an operating-system lock, which ends with the process that holds it, however that ends.

    Loader processes of a killed run live for some seconds, and hold its lock so long: a lock is waited for.

    Raises:
        Timeout: if another process keeps holding it.
    """
    lock = FileLock(path, timeout=LOCK_SECONDS)
    lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            lock.release()


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Send log messages of the library to a file, at level INFO, for the duration of the block."""
    library = logging.getLogger("crate_mae")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(message)s"))
    level = library.level
    library.addHandler(handler)
    library.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        library.setLevel(level)
        library.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log file. An error in writing is raised: it stops the run as one in writing any other file does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  # logging's name
        """Raise the error, where `logging` would print a traceback and continue."""
        raise  # `logging` calls this from its handler of exceptions

    def close(self) -> None:
        """Close the file; an error has been raised before."""
        with suppress(OSError):
            super().close()
