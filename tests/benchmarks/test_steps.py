"""The benchmark compares what is the same function, and runs from end to end."""

import pytest
import torch

from benchmarks import entries, steps
from benchmarks.entries import ENTRIES
from benchmarks.reference import Reference
from crate_mae.models.official import to_official

CPU = torch.device("cpu")


@pytest.fixture
def size():
    return entries.sizes()["nano"]


@pytest.mark.parametrize("name", ["ours", "ours, layers computed again"])
def test_ours_is_the_function_of_the_reference_with_its_gradients(name, size):
    ours, reference = ENTRIES[name](size, CPU), ENTRIES["reference"](size, CPU)
    assert isinstance(reference.model, Reference)
    torch.testing.assert_close(ours.loss(), reference.loss())
    torch.testing.assert_close(ours.encode(), reference.encode())
    ours.loss().backward()
    reference.loss().backward()
    for parameter in ours.model.parameters():
        parameter.data = parameter.grad
    expected = to_official(ours.model)
    state = reference.model.state()
    assert len(list(ours.model.parameters())) == len(state) - 1  # positions are fixed
    for name, parameter in reference.model.state().items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_twins_have_one_configuration(size):
    pytest.importorskip("transformers")
    timm, transformers = ENTRIES["timm blocks"](size, CPU), ENTRIES["transformers"](size, CPU)
    assert sum(p.numel() for p in timm.model.parameters()) == sum(
        p.numel() for p in transformers.model.parameters() if p.requires_grad
    )
    assert timm.encode().shape == transformers.encode().shape


def test_a_small_run_writes_a_table_and_a_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "DUELS", {"training": [("ours", "reference")]})
    monkeypatch.setattr(steps, "ENTRIES", dict.fromkeys(["reference"]))  # each in a process of its own
    measure = ["--sizes", "nano", "--tasks", "training", "--precisions", "float32", "--threads", "1", "--rounds", "2"]
    steps.main(["--machine", "test", "--out", str(tmp_path), "--batch", "3", *measure])
    (table,), (chart,) = tmp_path.glob("steps_test_*.md"), tmp_path.glob("steps_test_*.png")
    text = table.read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("| nano | float32 |") == 2  # the duel, and the memory
    assert "(1.00)" in text
    assert "Images a step: nano 3." in text
    assert chart.stat().st_size > 1000
