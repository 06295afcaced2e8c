"""The command `compare`: its errors and its dry run, as a user sees them."""

import pytest

MODELS = ("crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8")
DATA = ("--train", "digits:train", "--val", "digits:test")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([*MODELS, *DATA, "--out", "x"], "--budget"),
        ([*MODELS, *DATA, "--budget", "hours=2", "--out", "x"], "steps=N, minutes=N or flops=N"),
        ([MODELS[0], *DATA, "--budget", "steps=9", "--out", "x"], "at least two models"),
        ([*MODELS, MODELS[0], *DATA, "--budget", "steps=9", "--out", "x"], "named twice"),
        ([*MODELS, "vit_mae_nan_patch2_8", *DATA, "--budget", "steps=9", "--out", "x"], "Did you mean"),
        ([*MODELS, "--train", "digits", "--val", "digits", "--budget", "steps=9", "--out", "x"], "the same images"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(tokens, words, crate_mae_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = crate_mae_command("compare", *tokens)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_plan(crate_mae_command, tmp_path, monkeypatch):
    monkeypatch.setattr("crate_mae.comparison.entries.step_memory", lambda *_: None)
    options = ("--batch-size", "10", "--threads", "1", "--workers", "0", "--precision", "float32", "--no-flip")
    out = tmp_path / "out"
    code, text, error = crate_mae_command(
        "compare", *MODELS, *DATA, "--budget", "steps=100", "--out", out, "--dry-run", *options
    )
    assert code == 0, error
    for name in MODELS:
        assert f"{name}: " in text
    assert "search 3 x 10 steps, final run 70 steps" in text
    assert not out.exists()
