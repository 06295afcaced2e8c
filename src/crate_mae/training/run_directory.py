"""Where a run keeps everything: plain files, each written whole or not at all.

RUN/
    config.yaml         which command made the run, and every option, resolved; `--config` of it repeats the run
    command.txt         the commands that started and resumed the run, one per line, with their times
    environment.json    versions, machine, devices and threads of the last start
    log.txt             what the library logged
    metrics.csv         loss, learning rate, speed and results on held-out images, by step
    layers.csv          of pretraining: sparsity and subspace rate of every layer: step, part, layer, measure, value
    bad_files.csv       unreadable images: step, location, reason
    checkpoints/
        step-1200/      model.safetensors + config.json (a MODEL like any other)
                        optimizer.safetensors + state.json
                        trained.safetensors: if the model is an average, the weights that are averaged
        last            one line: the name of the newest complete checkpoint
        best            of fine-tuning: the name of the checkpoint with the best score on the validation images
    pictures/           of pretraining: step-1200.png: held-out images, masked, completed
    report.html         to look at while the run continues: curves, the newest picture, what the run is
    tensorboard/        if TensorBoard is installed
    model.safetensors   the finished model: of pretraining the last one, of fine-tuning the best one, with
    config.json         how it is built
    lock                host and process that writes here now
"""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import platform
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from crate_mae.data.files import refuse_used_folder, write_whole
from crate_mae.errors import UserError
from crate_mae.training.config import load_config, save_config
from crate_mae.training.options import FinetuneOptions, PretrainOptions, RunOptions

if TYPE_CHECKING:
    from crate_mae.models.weights import Model


logger = logging.getLogger(__name__)

LEARNING = ("step", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "bad_images")
SPEED = ("images_per_second", "data_wait")
LAYERS = ("step", "part", "layer", "measure", "value")
BAD_FILES = ("step", "location", "reason")
_PACKAGES = ("crate-mae", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run, and what is written there besides checkpoints."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved options; a folder with this file is a run."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def metrics(self, measures: Sequence[str] = ()) -> CsvLog:
        """One row per logged step; to write rows, give the measures of the task."""
        return CsvLog(self.path / "metrics.csv", (*LEARNING, *measures, *SPEED))

    @property
    def layers(self) -> CsvLog:
        """One row per layer and measure."""
        return CsvLog(self.path / "layers.csv", LAYERS)

    @property
    def bad_files(self) -> CsvLog:
        """One row per unreadable image."""
        return CsvLog(self.path / "bad_files.csv", BAD_FILES)

    def picture(self, step: int) -> Path:
        """The picture of a step."""
        return self.path / "pictures" / f"step-{step}.png"

    @property
    def report(self) -> Path:
        """The report of the run."""
        return self.path / "report.html"

    def newest_picture(self) -> tuple[int, Path] | None:
        """The last picture, and its step; None if there is none."""
        steps = [int(path.stem.removeprefix("step-")) for path in (self.path / "pictures").glob("step-*.png")]
        return (max(steps), self.picture(max(steps))) if steps else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its final model; `config.json` is written last."""
        return (self.path / "config.json").exists()

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return f"crate-mae resume {shlex.quote(str(self.path))}"

    def existing_config(self) -> PretrainOptions | FinetuneOptions | None:
        """The configuration of the run that is already here; None if the folder is free to use.

        Raises:
            UserError: if the path is a file, or a folder with something else in it.
        """
        if self.config_file.exists():
            return load_config(self.config_file)
        refuse_used_folder(self.path, kind="a run of crate-mae", leftovers=("lock", ".config.yaml."))
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
                stack.enter_context(self._begun(config))
            except (OSError, UserError) as error:
                if is_new:
                    shutil.rmtree(self.path, ignore_errors=True)
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"Cannot write into the folder {self.path}: {error.strerror}. Give another with --out."
                ) from error
            yield

    @contextmanager
    def _begun(self, config: RunOptions) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / "lock"):
            save_config(config, self.config_file)
            write_whole(self.path / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
            with (self.path / "command.txt").open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')}  {shlex.join(sys.argv)}\n")
            self.checkpoints.mkdir(exist_ok=True)
            with _logged_to(self.path / "log.txt"):
                yield

    def cut_back(self, step: int | None) -> None:
        """Forget what was logged after `step`; None forgets everything."""
        for table in (self.metrics(), self.layers, self.bad_files):
            table.cut_back(step)
        for picture in (self.path / "pictures").glob("step-*.png"):
            if step is None or int(picture.stem.removeprefix("step-")) > step:
                picture.unlink()


@dataclass(frozen=True)
class Run:
    """What `pretrain`, `finetune` and `resume` return.

    Attributes:
        path: the run's folder.
        config: its resolved options.
    """

    path: Path
    config: RunOptions

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return RunDirectory(self.path).resume_command

    def model(self) -> Model:
        """The finished model; of a run that is not finished, the model of its newest checkpoint.

        Raises:
            UserError: if the run has neither yet.
        """
        from crate_mae.models.weights import load

        return load(self.path)

    def metrics(self) -> list[dict[str, float | None]]:
        """The rows of metrics.csv; a value that was not measured at a step is None."""
        rows = RunDirectory(self.path).metrics().read()
        return [{key: float(value) if value else None for key, value in row.items()} for row in rows]


class CsvLog:
    """A table in a CSV file that grows by rows during a run.

    Rows are flushed as they come. The first column is the step: when a run resumes from a checkpoint, the rows
    after its step are removed, and so is a row that was half written when the process died.

    Args:
        path: the file; it is created with the first row.
        columns: names of the columns, the first being "step".
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
        """All complete rows, as text."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(complete.splitlines()))

    def cut_back(self, step: int | None) -> None:
        """Keep the rows up to and including `step`, with the columns that they have; None keeps nothing."""
        if not self.path.exists():
            return
        kept = [row for row in self.read() if step is not None and int(row["step"]) <= step]
        temporary = CsvLog(self.path.with_name(f".{self.path.name}.tmp"), list(kept[0]) if kept else self.columns)
        temporary.path.unlink(missing_ok=True)
        temporary.append(kept)
        if kept:
            temporary.path.replace(self.path)
        else:
            self.path.unlink()


def environment() -> dict[str, Any]:
    """Versions and machine, which are needed to repeat a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file with host and process number. That of a process which no longer exists is taken over."""
    holder = {"host": socket.gethostname(), "pid": os.getpid()}
    if path.exists():
        _refuse_if_held(path, holder)
        path.unlink(missing_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:  # "x": of two processes starting at once, one gets it
            file.write(json.dumps(holder))
    except FileExistsError as error:
        raise UserError(f"{path.parent} has just been taken by another process.") from error
    except OSError:
        path.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _refuse_if_held(path: Path, holder: dict[str, Any]) -> None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        host, pid = str(held["host"]), int(held["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # incomplete: its process died while writing
    if host == holder["host"] and (pid == holder["pid"] or not _is_alive(pid)):
        logger.info("Taking over from process %d, which is gone.", pid)
        return
    raise UserError(
        f"{path.parent} is being written by process {pid} on {host}.\n"
        f"Wait for it or stop it. If it is certainly gone, delete {path}."
    )


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # there, os.kill would end the process instead of testing for it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Send log messages of the library to a file, at level INFO, for the duration of the block."""
    library = logging.getLogger("crate_mae")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = library.level
    library.addHandler(handler)
    library.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        library.setLevel(level)
        library.removeHandler(handler)
        handler.close()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which takes the name `path` when the block ends without an exception.

    A folder already at `path` is replaced. If the block fails, nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            flush_to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that the disk, or the user's quota, is full.

    Exceptions of safetensors have no error number, only the operating system's message. An exception raised from
    another one is judged by its cause.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, SafetensorError):
        return any(os.strerror(number) in str(error) for number in _FULL)
    return error.__cause__ is not None and is_disk_full(error.__cause__)


def flush_to_disk(file: Path) -> None:
    """Have the operating system write a file to disk: its new name must not reach the disk before its contents."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
