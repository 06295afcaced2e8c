"""What happens to a run from outside: full disks, folders that go, signals, loader processes that die."""

import errno
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from crate_mae.commands.train import pretrain, resume
from crate_mae.data.dataset import explain_lost_processes
from crate_mae.errors import RunStopped, UserError
from crate_mae.training.failures import explain_end
from crate_mae.training.options import PretrainOptions
from crate_mae.training.processes import STOPPING
from crate_mae.training.progress import LastingStream
from crate_mae.training.report import open_trackers
from crate_mae.training.run_directory import CsvLog
from tests.training.conftest import TINY_RUN, at_step, cpu, no_report, usual_signals  # noqa: F401  # fixtures

SHORT = {**TINY_RUN, "steps": 6, "batch_size": 64, "checkpoint_minutes": 1e-9, "log_steps": 1}
DATA = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(140)]


def failing(number):
    def fail(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full(.|\n)*Free some space"),
        (errno.EDQUOT, "the disk quota is exceeded(.|\n)*Free some space, or ask for a larger quota"),
        (errno.EFBIG, "would exceed the size limit(.|\n)*ulimit -f"),
        (errno.EROFS, "read-only file system(.|\n)*Remount the file system for writing, then: "),
        (errno.EACCES, "permission denied(.|\n)*Allow writing"),
        (errno.EIO, "input/output error(.|\n)*Check the disk"),
    ],
)
def test_the_reason_why_a_file_of_a_run_cannot_be_written_comes_with_a_remedy(tmp_path, number, expected):
    (tmp_path / "config.yaml").write_text("")
    explained = explain_end(Accelerator(cpu=True), PretrainOptions("digits", out=tmp_path))
    with pytest.raises(UserError, match=f"{expected}(.|\n)*crate-mae resume"), explained:
        failing(number)()
    with (
        pytest.raises(UserError, match=expected),
        explain_end(Accelerator(cpu=True), PretrainOptions("digits", out=tmp_path)),
    ):
        try:
            failing(number)()
        except OSError as error:
            raise UserError("Cannot write") from error


def test_other_errors_are_not_explained_as_ones_in_writing(tmp_path):
    with (
        pytest.raises(OSError, match="Permission"),
        explain_end(Accelerator(cpu=True), PretrainOptions("digits", out=tmp_path / "run")),
    ):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / "image.png"))


def test_a_file_that_cannot_be_written_stops_the_run_and_says_what_is_saved(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: patch.setattr(CsvLog, "append", failing(errno.EROFS)))
        with pytest.raises(UserError, match=r"read-only file system(.|\n)*Everything up to step-4 is saved"):
            pretrain(DATA, out=tmp_path / "run", **SHORT)


def test_a_log_that_cannot_be_written_stops_the_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.StreamHandler, "flush", failing(errno.ENOSPC))
    with pytest.raises(UserError, match="the disk is full"):
        pretrain(DATA, out=tmp_path / "run", **SHORT)


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path, how):
    run, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: shutil.rmtree(run) if how == "deleted" else run.rename(moved))
        with pytest.raises(UserError, match="was deleted or moved"):
            pretrain(DATA, out=tmp_path / "run", **SHORT)
    assert not run.exists()
    if how == "moved":
        assert (moved / "checkpoints" / "step-3").is_dir()


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", STOPPING[-1:])  # SIGHUP, where there is one; of the others there are more tests
def test_a_signal_stops_and_saves(tmp_path, number):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunStopped) as stopped:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        pretrain(DATA, out=tmp_path / "run", **{**SHORT, "checkpoint_minutes": 10.0})
    assert stopped.value.signal == number


def test_a_terminal_that_is_closed_is_written_to_no_more():
    class Closed:
        encoding = "utf-8"
        write = flush = staticmethod(failing(errno.EIO))

    stream = LastingStream(Closed())
    assert stream.write("text") == 4
    stream.flush()
    assert stream.encoding == "utf-8"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "DataLoader worker (pid 31) is killed by signal: Killed. ",
            r"Data loader process 31 was killed \(signal: Killed\), .* memory ran out\.\nUse fewer --workers",
        ),
        (
            "DataLoader worker (pid(s) 31, 32) exited unexpectedly",
            r"Data loader process 31, 32 was killed, .* memory ran out\.",
        ),
        ("DataLoader worker (pid 31) is killed by signal: Bus error. It is possible", "shared memory .*too small"),
    ],
)
def test_a_loader_process_that_was_ended_is_explained(message, expected):
    with pytest.raises(UserError, match=expected), explain_lost_processes():
        raise RuntimeError(message)
    with pytest.raises(UserError, match="A data loader process was killed, most likely"), explain_lost_processes():
        raise EOFError
    with pytest.raises(RuntimeError, match="another"), explain_lost_processes():
        raise RuntimeError("another")


def test_a_run_that_loses_a_loader_says_what_is_saved_and_goes_on(tmp_path):
    def killed():
        raise RuntimeError("DataLoader worker (pid 31) is killed by signal: Killed. ")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, killed)
        with pytest.raises(UserError, match=r"process 31(.|\n)*up to step-3 is saved(.|\n)*crate_mae.pretrain"):
            pretrain(DATA, out=tmp_path / "run", **SHORT)
    with pytest.raises(UserError, match="Python object"):
        resume(tmp_path / "run", quiet=True)
    assert pretrain(DATA, out=tmp_path / "run", **SHORT).model().num_patches == 16


def test_a_thread_of_tensorboard_that_cannot_write_prints_nothing_and_other_threads_do(monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: seen.append(raised.exc_value))
    accelerator, config = Accelerator(cpu=True), PretrainOptions("digits", out="run", trackers=())
    full, bug = OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")

    def raising(error, module):
        def run(_self):
            raise error

        thread = type("Writer", (threading.Thread,), {"__module__": module, "run": run})()
        thread.start()
        thread.join()

    with open_trackers(accelerator, config, Path("run"), 0):
        raising(full, "tensorboard.summary.writer.event_file_writer")
        assert seen == []
        raising(bug, "tensorboard.summary.writer.event_file_writer")
        raising(full, "elsewhere")
    raising(full, "tensorboard.summary.writer.event_file_writer")
    assert seen == [bug, full, full]
