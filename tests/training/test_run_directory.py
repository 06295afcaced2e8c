import json
import logging
import os
import socket
import subprocess
import sys

import pytest

from crate_mae.errors import UserError
from crate_mae.training.run_directory import CsvLog, RunDirectory, whole_folder

logger = logging.getLogger("crate_mae.somewhere")


@pytest.fixture
def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_begins_with_its_configuration_command_environment_and_log(tmp_path, config):
    directory = RunDirectory(tmp_path / "deep" / "run")
    assert directory.existing_config() is None
    with directory.opened(config):
        logger.info("inside")
    logger.info("outside")
    assert directory.existing_config() == config
    assert json.loads((directory.path / "environment.json").read_text())["packages"]["torch"]
    assert (directory.path / "command.txt").read_text().count("\n") == 1
    log = (directory.path / "log.txt").read_text()
    assert "inside" in log and "outside" not in log
    assert not (directory.path / "lock").exists()


def test_files_and_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "file").existing_config()
    with pytest.raises(UserError, match="not empty and not a run"):
        RunDirectory(tmp_path).existing_config()


def test_a_run_that_is_being_written_is_refused(tmp_path, config):
    holder = {"host": socket.gethostname(), "pid": os.getppid()}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with pytest.raises(UserError, match=f"process {os.getppid()} on"), RunDirectory(tmp_path).opened(config):
        pass
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("content", ["", '{"host": "', None])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, config, dead_process, content):
    if content is None:
        content = json.dumps({"host": socket.gethostname(), "pid": dead_process})
    (tmp_path / "lock").write_text(content)
    with RunDirectory(tmp_path).opened(config):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_another_machines_lock_is_kept(tmp_path, config):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(UserError, match="on elsewhere"), RunDirectory(tmp_path).opened(config):
        pass


def test_a_table_is_cut_back_to_a_step_and_loses_half_written_rows(tmp_path):
    table = CsvLog(tmp_path / "t.csv", ("step", "a", "b"))
    table.append([{"step": 1, "a": 0.1}, {"step": 12, "b": "x, y"}])
    with table.path.open("a") as file:
        file.write("13,half")
    assert [row["step"] for row in table.read()] == ["1", "12"]
    table.cut_back(12)
    assert table.path.read_text() == 'step,a,b\n1,0.1,\n12,,"x, y"\n'
    table.cut_back(11)
    assert table.path.read_text() == "step,a,b\n1,0.1,\n"
    table.cut_back(None)
    assert not table.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_cutting_a_run_back_removes_later_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for step in (0, 9, 10):
        (tmp_path / "pictures" / f"step-{step}.png").touch()
    RunDirectory(tmp_path).cut_back(9)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["step-0.png", "step-9.png"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("first")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("second")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "first"
