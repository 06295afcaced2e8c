"""The command line: quick, helpful, and the same functions as from Python."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys

import pytest

import crate_mae
from crate_mae import cli

PLACES = {name: place for name, (place, _) in cli._COMMANDS.items()} | {
    f"{group} {name}": place for group, (_, commands) in cli._GROUPS.items() for name, (place, _) in commands.items()
}
FUNCTIONS = {
    command: getattr(importlib.import_module(f"crate_mae.commands.{module}"), name)
    for command, (module, name) in ((command, place.split(":")) for command, place in PLACES.items())
}


def test_help_lists_every_command_and_imports_nothing_heavy():
    program = (
        "import sys, json, contextlib, io\n"
        "from crate_mae.cli import main\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        "    main(['--help'])\n"
        "print(json.dumps([out.getvalue(), sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, modules = json.loads(result.stdout)
    assert not {"torch", "timm", "torchvision", "accelerate", "sklearn", "numpy"} & set(modules)
    for command in FUNCTIONS:
        assert f" {command.split()[0]} " in text


@pytest.mark.parametrize("command", FUNCTIONS)
def test_a_command_is_its_python_function_option_by_option(command, crate_mae_command):
    function = FUNCTIONS[command]
    app = cli.build_app()
    for word in command.split():
        app = app[word]
    assert inspect.unwrap(app.default_command) is inspect.unwrap(function)
    if function.__name__ in crate_mae.__all__:
        assert getattr(crate_mae, function.__name__) is function
    code, text, _ = crate_mae_command(*command.split(), "--help")
    assert code == 0
    for name in inspect.signature(function).parameters:
        assert f"--{name.replace('_', '-')}" in text or name.upper() in text, name


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_option_is_explained(command):
    function = FUNCTIONS[command]
    for name in inspect.signature(function).parameters:
        assert f"        {name}: " in function.__doc__, name


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["pretrian"], "Did you mean"),
        (["pretrain", "digits", "--out", "x", "--epohcs", "3"], "--epochs"),
        (["pretrain", "digits"], "--out"),
        (["pretrain", "digits", "--out", "x", "--epochs", "many"], "epochs"),
        (["pretrain", "digits", "--out", "x", "--precision", "float8"], "precision"),
        (["resume", "nowhere"], "is not a run"),
        (["finetune", "nowhere", "--train", "digits", "--val", "digits", "--out", "x"], "A model is a run folder"),
        (["finetune", "nowhere", "--train", "digits", "--out", "x"], "--val"),
        (["predict", "crate_mae_nano_patch2_8", "digits", "--out", "x.csv"], "has no classes"),
        (["reconstruct", "nowhere", "digits", "--out", "x.png"], "A model is a run folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tokens, words, crate_mae_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = crate_mae_command(*tokens)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 4
    assert list(tmp_path.iterdir()) == []


def test_options_come_from_a_file_and_typed_ones_win(crate_mae_command, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(
        "data: digits\nmodel: crate_mae_nano_patch2_8\nepochs: 3\nseed: 7\ninit_from: null\nval:\nmean:\n"
    )
    tokens = ["pretrain", "--config", options, "--out", tmp_path / "run", "--epochs", "2", "--dry-run"]
    code, text, error = crate_mae_command(*tokens)
    assert code == 0, error
    assert "2 epochs" in text
    assert not (tmp_path / "run").exists()


def test_words_that_a_shell_made_of_a_pattern_are_explained(crate_mae_command):
    code, _, error = crate_mae_command("pretrain", "a.jpg", "b.jpg", "c.jpg", "--out", "run")
    assert code == 2
    assert "b.jpg and 1 more cannot be used here: " in error and "give its folder" in error


def test_an_unknown_key_in_a_file_is_named(crate_mae_command, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("epohcs: 3\n")
    code, _, error = crate_mae_command("--config", options, "pretrain", "digits", "--out", tmp_path / "run")
    assert code == 2
    assert "epohcs" in error


def test_a_missing_file_of_options_is_named(crate_mae_command, tmp_path):
    code, _, error = crate_mae_command("--config", tmp_path / "none.yaml", "pretrain", "digits", "--out", "x")
    assert code == 2
    assert "none.yaml" in error


def test_models_are_listed_with_their_sizes(crate_mae_command):
    code, text, _ = crate_mae_command("models")
    assert code == 0
    for name in crate_mae.list_models():
        assert name in text
    for number in ("43.75 M", "607.25 M", "224 x 224 / 16", "24 + 24"):
        assert number in text


def test_doctor_tells_versions_and_device(crate_mae_command):
    code, text, _ = crate_mae_command("doctor")
    assert code == 0
    for word in ("crate-mae", "torch", "GPU", "GFLOP/s", "free disk"):
        assert word in text


def test_public_names_are_importable_and_listed():
    for name in crate_mae.__all__:
        assert getattr(crate_mae, name) is not None
        assert name in dir(crate_mae)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        crate_mae.pretrian  # noqa: B018


def test_a_shell_completes_commands_and_options(tmp_path):
    script = tmp_path / "completion"
    script.write_text(cli.build_app().generate_completion(shell="bash"), encoding="utf-8")

    def completed(*words):
        line = " ".join(f"'{word}'" for word in ("crate-mae", *words))
        asked = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _crate_mae; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split()

    if shutil.which("bash") is None:
        pytest.skip("there is no bash on this machine")
    assert completed("pretr") == ["pretrain"]
    assert completed("eval", "lin") == ["linear"]
    assert completed("pretrain", "--mask-ra") == ["--mask-ratio"]
