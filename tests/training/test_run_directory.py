import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crate_mae.data.files import filled_folder, whole_folder
from crate_mae.errors import UserError
from crate_mae.training import run_directory
from crate_mae.training.run_directory import CsvLog, RunDirectory

logger = logging.getLogger("crate_mae.somewhere")


def test_a_run_begins_with_its_configuration_command_environment_and_log(tmp_path, config):
    directory = RunDirectory(tmp_path / "deep" / "run")
    assert directory.existing_config() is None
    with directory.opened(config):
        logger.info("inside %s", "a\x1b[31mb\udcff")  # as names of files may be
    logger.info("outside")
    assert directory.existing_config() == config
    assert json.loads((directory.path / "environment.json").read_text())["packages"]["torch"]
    assert (directory.path / "command.txt").read_text().count("\n") == 1
    log = (directory.path / "log.txt").read_text()
    assert r"INFO inside a\x1b[31mb\udcff" in log and "outside" not in log


def test_files_and_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "file").existing_config()
    with pytest.raises(UserError, match="not empty and not a run"):
        RunDirectory(tmp_path).existing_config()


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_written_by_one_process_at_a_time_until_that_ends_however_it_does(tmp_path, config, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run of crate-mae"), RunDirectory(tmp_path).opened(config):
            pass
        other.kill()
    with RunDirectory(tmp_path).opened(config):
        pass


def test_of_two_threads_one_writes_a_run(tmp_path, config, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)

    def refused():
        with pytest.raises(UserError, match="another run of crate-mae"), RunDirectory(tmp_path).opened(config):
            pass

    with RunDirectory(tmp_path).opened(config), ThreadPoolExecutor(1) as pool:
        pool.submit(refused).result()


def test_what_killed_processes_and_earlier_versions_left_is_removed(tmp_path, config):
    for name in ("lock", ".config.yaml.0123abcd", ".report.html.0123abcd"):
        (tmp_path / name).write_text("")
    (tmp_path / ".writing-abcdefgh").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / ".notes.tmp").write_text("mine")
    with RunDirectory(tmp_path).opened(config):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        ".lock", ".notes.tmp", "checkpoints", "command.txt", "config.yaml", "environment.json", "log.txt"
    }  # fmt: skip


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


def test_a_table_of_an_earlier_version_gets_the_columns_that_it_lacks(tmp_path):
    (tmp_path / "t.csv").write_text("step,a,gone\n1,2,3\n")
    table = CsvLog(tmp_path / "t.csv", ("step", "a", "new"))
    table.widen()
    table.append([{"step": 2, "new": 5}])
    assert table.path.read_text() == "step,a,new,gone\n1,2,,3\n2,,5,\n"
    table.widen()
    assert len(table.read()) == 2 and [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_cutting_a_run_back_removes_later_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("step-0", "step-9", "step-10", "step-10 (copy)"):
        (tmp_path / "pictures" / f"{name}.png").touch()
    directory = RunDirectory(tmp_path)
    assert directory.newest_picture() == (10, directory.picture(10))
    directory.cut_back(9)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "step-0.png",
        "step-10 (copy).png",
        "step-9.png",
    ]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("first")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("second")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "first"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("first")
    rename = Path.rename

    def renamed(self, target):
        if self.name.endswith(".tmp"):
            raise PermissionError
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(PermissionError), whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "first"


def test_a_folder_comes_back_after_a_kill_while_it_was_replaced(tmp_path):
    (tmp_path / ".a.former").mkdir()
    (tmp_path / ".a.former" / "x").write_text("first")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a"):
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "first"
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "second"


@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_is_filled_whole_or_not_at_all_and_nothing_of_others_is_lost(tmp_path, is_new):
    out = tmp_path / "a"
    if not is_new:
        (out / ".writing-of-a-killed-program").mkdir(parents=True)
    with pytest.raises(RuntimeError), filled_folder(out) as folder:
        (folder / "x").write_text("first")
        raise RuntimeError
    assert out.exists() is not is_new and not list(tmp_path.rglob("*x*"))
    with pytest.raises(UserError, match="exists already"), filled_folder(out) as folder:
        (folder / "x").write_text("second")
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]
    (out / "mine").unlink()
    before = out.stat()
    with filled_folder(out) as folder:
        (folder / "x").write_text("third")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]
    assert out.stat().st_ino == before.st_ino
