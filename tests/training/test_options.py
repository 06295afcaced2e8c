"""The command line, the configuration file and Python take the same options."""

import dataclasses
import functools
import inspect
import os
from pathlib import Path

import cyclopts
import pytest

from crate_mae import cli
from crate_mae.commands.finetune import finetune
from crate_mae.commands.pretrain import pretrain
from crate_mae.errors import UserError
from crate_mae.training.config import FinetuneConfig, PretrainConfig
from crate_mae.training.options import resolve_machine


def parse(words, *files, command="pretrain"):
    app = cli.build_app()
    app.config = [functools.partial(cli._options_of, cyclopts.config.Yaml(file)) for file in files]
    _, bound, _ = app.parse_args([command, *words], exit_on_error=False, print_error=False)
    return bound.arguments


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--image-size 224", "image_size", 224),
        ("--image-size 128x192", "image_size", (128, 192)),
        ("--mean 0.1 0.2 0.3", "mean", (0.1, 0.2, 0.3)),
        ("--model-settings.threshold 0.1", "model_settings", {"threshold": 0.1}),
        ("--model-settings.depth 2 --model-settings.ista_skip true", "model_settings", {"depth": 2, "ista_skip": True}),
        ("--no-flip", "flip", False),
        ("--no-trackers", "trackers", ()),
        ("--trackers tensorboard wandb", "trackers", ("tensorboard", "wandb")),
        ("--val other", "val", "other"),
    ],
)
def test_words_become_values(words, key, value):
    arguments = parse(["images", "--out", "run", *words.split()])
    assert arguments[key] == value
    assert (arguments["data"], arguments["out"]) == ("images", Path("run"))


def test_an_image_size_that_is_none_is_refused():
    with pytest.raises(cyclopts.CycloptsError, match="HEIGHTxWIDTH"):
        parse(["images", "--out", "run", "--image-size", "big"])


def test_the_configuration_file_of_a_run_gives_the_same_options_again(config, tmp_path):
    config.save(tmp_path / "config.yaml")
    arguments = parse(["--out", "again"], tmp_path / "config.yaml")
    wanted = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    assert {key: arguments[key] for key in wanted} == wanted


def test_so_does_that_of_fine_tuning(finetune_config, tmp_path):
    finetune_config.save(tmp_path / "config.yaml")
    arguments = parse(["--out", "again"], tmp_path / "config.yaml", command="finetune")
    wanted = dataclasses.asdict(finetune_config)
    assert {key: arguments[key] for key in wanted} == wanted


def test_the_configuration_file_of_another_command_is_refused(config, tmp_path):
    config.save(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="options of `crate-mae pretrain`, not of `crate-mae finetune`"):
        parse(["--out", "again"], tmp_path / "config.yaml", command="finetune")


@pytest.mark.parametrize(
    ("command", "kind", "forgotten"), [(pretrain, PretrainConfig, {"recipe"}), (finetune, FinetuneConfig, set())]
)
def test_every_option_of_a_configuration_is_one_of_its_command(command, kind, forgotten):
    options = set(inspect.signature(command).parameters)
    kept = {field.name for field in dataclasses.fields(kind)}
    assert options - kept == {"out", "epochs", "dry_run", "quiet"} | forgotten
    assert kept <= options


@pytest.mark.parametrize("command", [pretrain, finetune])
def test_every_option_is_explained(command):
    explained = inspect.getdoc(command).split("Args:")[1]
    assert all(f"    {name}: " in explained for name in inspect.signature(command).parameters)


@pytest.mark.parametrize(("processes", "here", "workers"), [(1, None, 8), (4, None, 3), (64, "8", 1), (16, "16", 0)])
def test_cores_are_shared_by_the_processes_of_one_machine(processes, here, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    given = {"workers": None, "threads": 1, "checkpoint_epochs": None}
    resolve_machine(given, processes)
    assert given["workers"] == workers
