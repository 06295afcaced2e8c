"""Words of the command line that would be rounded, or mean nothing: each is named, and nothing is written."""

import json
import subprocess
import sys

import pytest

from crate_mae.cli import main

PRETRAIN = ["pretrain", "digits", "--out", "run", "--dry-run"]
PROBE = ["eval", "knn", "pixels", "--train", "digits:train", "--val", "digits:test"]
WORDS = {
    "a fraction of a step": ([*PRETRAIN, "--steps", "2.7"], "--steps is 2.7, but must be a whole number"),
    "a fraction of an image": ([*PRETRAIN, "--batch-size", "7.6"], "--batch-size is 7.6"),
    "a fraction of a neighbour": ([*PROBE, "--k", "1.9"], "--k is 1.9"),
    "a fraction of a layer": ([*PROBE, "--layer", "0.5"], "--layer is 0.5"),
    "one of several": (["eval", "fewshot", *PROBE[2:], "--shots", "1", "2.5"], "--shots is 2.5"),
    "a number of 40 digits": ([*PRETRAIN, "--seed", "9" * 40], "--seed is 999"),
    "infinity": ([*PRETRAIN, "--lr", "inf"], "--lr is inf, but must be a finite number"),
    "no number": ([*PRETRAIN, "--warmup-epochs", "nan"], "--warmup-epochs is nan"),
    "no number of several": ([*PRETRAIN, "--mean", "0.5", "nan"], "--mean is nan"),
    "more than a float": ([*PRETRAIN, "--clip-grad", "1e400"], "--clip-grad is 1e400"),
    "no data": (["pretrain", "", "--out", "run"], "--data is empty"),
    "no folder": (["pretrain", "digits", "--out", ""], "--out is empty"),
    "no model": (["embed", "", "digits", "--out", "x.npy"], "--model is empty"),
    "no file": (["embed", "pixels", "digits", "--out", ""], "--out is empty"),
    "a name that is no text": (["theory", "--out", "x\udcff"], r"--out 'x\udcff' is not valid text in utf-8"),
    "a run of such a name": (["pretrain", "digits", "--out", "x\udcff"], "is not valid text"),
    "a table of such a name": (["data", "check", "digits", "--out", "x\udcff.csv"], "is not valid text"),
    "a name that is too long": (["theory", "--out", "x" * 5000], "file name too long"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_words_that_mean_nothing_are_named(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, expected = WORDS[kind]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_option_may_be_empty_where_that_means_something(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "m", "--train", "a", "--val", "b", "--out", "o", "--rand-augment", "", "--labels", "inf"])
    assert "--labels is inf" in capsys.readouterr().err


# As `python -O`, but for the large libraries, which would all be compiled anew: they are imported before.
_WITHOUT_ASSERTIONS = """
import json, sys
import accelerate, cyclopts, sklearn.datasets, torch, torchvision
from importlib.machinery import SourceFileLoader
compile_module = SourceFileLoader.source_to_code
SourceFileLoader.source_to_code = lambda *args, **_: compile_module(*args, _optimize=1)
sys.pycache_prefix, sys.dont_write_bytecode = "none", True
assert not any(name.startswith(("timm", "crate_mae")) for name in sys.modules)
exec(SourceFileLoader("", "").source_to_code(b"assert False, 'this is left out'", ""))
from crate_mae.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        print(stop.code, flush=True)
"""


def test_wrong_options_are_refused_where_python_leaves_assertions_out(tmp_path):
    model = "crate_mae_nano_patch2_8"
    finetune = ["finetune", model, "--train", "digits:train", "--val", "digits:test", "--out", "run", "--dry-run"]
    wrong = (
        [*finetune, "--rand-augment", "rand-x9"],  # which timm checks by an assertion
        [*finetune, "--labels", "2"],
        [*PRETRAIN, "--model", model, "--mask-ratio", "1.5"],
        [*PRETRAIN, "--model", model, "--batch-size", "4", "--accumulation", "3"],
        [*PROBE, "--k", "0"],
    )
    command = [sys.executable, "-c", _WITHOUT_ASSERTIONS, json.dumps(wrong)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"] * len(wrong)
    for words in ("--rand-augment", "--labels is 2", "--mask-ratio is 1.5", "cannot be divided among", "--k is 0"):
        assert words in done.stderr
    assert not any(tmp_path.iterdir())
