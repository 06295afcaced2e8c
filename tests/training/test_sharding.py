"""Real processes that share one model, and processes that are lost."""

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import crate_mae
from crate_mae.errors import UserError
from crate_mae.training.checkpoint import assign_tensors, part_file, write_index
from tests.training.real_processes import TORCHRUN, column, finish, largest_difference, sharded, world_size


def test_a_run_goes_on_with_any_number_of_processes_sharded_or_not(tmp_path, driver):
    options = ("steps=12", "accumulation=2", "monitor_steps=4")
    whole = driver("pretrain", tmp_path / "whole", *options)
    run = tmp_path / "run"
    finish(driver("pretrain", run, *options, "stop_at=6", environments=sharded(3)), code=143)
    three = run / "checkpoints" / "step-7"
    parts = sorted(path.name for path in three.glob("model*"))
    assert parts == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    assert world_size(three) == 3
    unfinished = crate_mae.load(run).state_dict()
    by_part = [load_file(three / name) for name in parts[:-1]]
    assert sorted(name for part in by_part for name in part) == sorted(unfinished)
    assert all(torch.equal(unfinished[name], tensor) for part in by_part for name, tensor in part.items())
    finish(driver("resume", run, "stop_at=9", environments=sharded(2)), code=143)
    assert world_size(run / "checkpoints" / "step-10") == 2
    finish(driver("resume", run))
    finish(whole)
    assert largest_difference(tmp_path / "whole", run) < 1e-5
    losses = [[float(loss) for loss in column(each, 2)[1:]] for each in (tmp_path / "whole", run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_sharded_model_is_fine_tuned_with_its_average_as_a_whole_one(tmp_path, driver, encoder_folder):
    options = (f"model={encoder_folder}", "steps=6", "monitor_steps=3", "drop_path=0.0")
    one = driver("finetune", tmp_path / "one", *options)
    two = ("finetune", tmp_path / "two", *options, "grad_checkpointing=true", "compile=true")
    finish(driver(*two, environments=sharded(2)))
    finish(one)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints" / "step-6").glob("trained*")) == [
        "trained-00001-of-00002.safetensors",
        "trained-00002-of-00002.safetensors",
        "trained.safetensors.index.json",
    ]
    assert column(tmp_path / "one", 8) == column(tmp_path / "two", 8)  # accuracies


def test_when_one_process_is_killed_the_other_reports_it_and_the_run_resumes(tmp_path, driver):
    options = ("steps=10", "checkpoint_minutes=0.0001")
    whole = driver("pretrain", tmp_path / "whole", *options)
    output = finish(driver("pretrain", tmp_path / "run", *options, "die_at=5", launcher=TORCHRUN), code=1)
    assert output.count("Process 0 of 2 lost contact with another process") == 1
    assert f"To continue: crate-mae resume {tmp_path / 'run'}" in output
    assert output.count("Traceback") == 1  # the launcher's own, about the process that was killed
    with FileLock(tmp_path / "run" / ".lock", timeout=0):  # which ended with the processes
        pass
    finish(driver("resume", tmp_path / "run"))
    finish(whole)
    assert largest_difference(tmp_path / "whole", tmp_path / "run") < 1e-5


def test_shares_are_about_equal_and_whole():
    sizes = [7, 5, 3, 2, 2, 11]
    holder = assign_tensors({str(i): torch.empty(size) for i, size in enumerate(sizes)}, 2)
    assert holder == {"0": 0, "1": 1, "2": 1, "3": 0, "4": 1, "5": 0}


def test_a_part_that_did_not_appear_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    part_file(path, 0, 2).touch()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors did not appear"):
        write_index(path, {"a": 0}, 2)
    assert not (tmp_path / "model.safetensors.index.json").exists()
