"""The benchmarks of growing costs and of estimated memory run from end to end, and fit what they say they fit."""

import csv
import re
import sys

import pytest

from benchmarks import growth, memory
from benchmarks.growth import Point


def points(power, values=(1, 2, 4, 8)):
    return [Point("depth", x, "CRATE-MAE", 3.0 * x**power, 5.0, 7.0 * x) for x in values]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    assert growth.exponent(points(power), "ms_per_image") == pytest.approx(power)
    assert growth.exponent(points(power), "mb_per_image") == pytest.approx(0.0, abs=1e-12)


def test_a_small_run_writes_exponents_numbers_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "MODELS", {"ours": "CRATE-MAE"})  # each point is measured in a process of its own
    few = ["--axes", "batch", "--most", "2", "--threads", "1", "--rounds", "2"]
    growth.main(["--machine", "test", "--out", str(tmp_path), *few])
    (table,), (numbers,), (figure,) = (tmp_path.glob(f"growth_test_*.{kind}") for kind in ("md", "csv", "png"))
    text = table.read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("| batch, 1 to 2 | CRATE-MAE |") == 1
    with numbers.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["1", "2"]
    assert all(float(row[cost]) > 0 for row in rows for cost in growth.COSTS)
    assert figure.stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
def test_estimated_memory_stands_beside_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MODELS", (("crate_mae_nano_patch2_8", {"embed_dim": 960}, 8),))
    how = ["--precisions", "float32", "--threads", "1", "--rounds", "1"]
    memory.main(["--machine", "test", "--out", str(tmp_path), *how])
    (table,) = tmp_path.glob("memory_test_*.md")
    row = re.search(r"\| crate_mae_nano_patch2_8, embed_dim 960 \| 8 \| float32 \|(.*)", table.read_text())
    assert row is not None
    measured, estimate, _error, tensors = re.findall(r"[+-]?[\d.,]+", row[1])[:4]
    assert int(tensors) < int(estimate)
    assert 0.7 < int(estimate) / int(measured) < 1.3
