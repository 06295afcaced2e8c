"""Processes and threads take turns, and what comes out is a table."""

import pytest

from benchmarks import scaling


def test_a_small_run_writes_a_table(tmp_path, capsys):
    measure = ["--sizes", "nano", "--threads", "2", "--rounds", "2", "--steps", "1"]
    scaling.main(["--machine", "test", "--out", str(tmp_path), *measure])
    (table,) = tmp_path.glob("scaling_test_*.md")
    text = table.read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| nano")]
    assert [row[2] for row in rows] == ["1 x 2", "2 x 1"]
    assert rows[0][-1] == "1.00 (1.00 to 1.00)"
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)


def test_a_member_that_ends_is_no_measurement():
    with (
        scaling._team("lost", "nano", 1, 1, {"PYTHONHOME": "nowhere"}) as team,
        pytest.raises(RuntimeError, match="process of lost has ended"),
    ):
        team.seconds(1)
