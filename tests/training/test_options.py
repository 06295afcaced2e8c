"""The command line, the configuration file and Python take the same options."""

import functools
import inspect
import os
from pathlib import Path

import cyclopts
import pytest

from crate_mae import cli
from crate_mae.commands.train import finetune, pretrain
from crate_mae.errors import UserError
from crate_mae.training.config import to_yaml
from crate_mae.training.options import FinetuneOptions, PretrainOptions, saved_options
from crate_mae.training.resolve import with_machine


def parse(words, *files, command="pretrain"):
    app = cli.build_app()
    app.config = [functools.partial(cli._options_of, file) for file in files]
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
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    arguments = parse(["--out", "again"], tmp_path / "config.yaml")
    values = {key: getattr(config, key) for key in saved_options(PretrainOptions)}
    wanted = {key: value for key, value in values.items() if value is not None}
    assert {key: arguments[key] for key in wanted} == wanted


def test_so_does_that_of_fine_tuning(finetune_config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(finetune_config), encoding="utf-8")
    arguments = parse(["--out", "again"], tmp_path / "config.yaml", command="finetune")
    wanted = {key: getattr(finetune_config, key) for key in saved_options(FinetuneOptions)}
    assert {key: arguments[key] for key in wanted} == wanted


def test_the_configuration_file_of_another_command_is_refused(config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with pytest.raises(UserError, match="options of `crate-mae pretrain`, not of `crate-mae finetune`"):
        parse(["--out", "again"], tmp_path / "config.yaml", command="finetune")


@pytest.mark.parametrize(
    ("command", "kind", "forgotten"), [(pretrain, PretrainOptions, {"recipe"}), (finetune, FinetuneOptions, set())]
)
def test_every_option_of_a_configuration_is_one_of_its_command(command, kind, forgotten):
    options = set(inspect.signature(command).parameters)
    kept = set(saved_options(kind))
    assert options - kept == {"out", "epochs", "minutes", "dry_run", "json", "quiet"} | forgotten
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
    assert with_machine(PretrainOptions("images", out="run", threads=1), processes).workers == workers


def test_python_takes_the_options_as_keywords_and_names_an_unknown_one():
    with pytest.raises(TypeError, match="epocs"):
        pretrain("digits", out="run", epocs=3)
    with pytest.raises(TypeError, match="'out'"):
        pretrain("digits")


def test_options_at_their_defaults_are_taken_from_the_run_that_exists(config):
    options = PretrainOptions("other", out="run", seed=0, mask_ratio=0.5).filled_from(config)
    assert (options.data, options.mask_ratio, options.seed, options.steps) == ("other", 0.5, 2**40, 39)
    assert PretrainOptions("other", out="run", epochs=3).filled_from(config).steps is None
