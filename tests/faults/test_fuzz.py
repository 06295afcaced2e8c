"""The command that fuzzes: every kind makes inputs that are handled, and faults are noticed."""

import random
from pathlib import Path

import pytest

from tests.faults.fuzz import FAULTS, Kind, all_kinds, attempt, fuzz


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.name)
def test_inputs_of_every_kind_are_handled(kind):
    for seed in range(3):
        result = attempt(kind, seed)
        assert result.outcome not in FAULTS, f"seed {seed}: {result.detail}"


def test_faults_are_told_apart():
    def fail(_given):
        raise KeyError("x")

    def die(_given):
        import os

        os._exit(3)

    def make(_rng: random.Random, folder: Path) -> Path:
        return folder

    kinds = [Kind("fails", make, (fail,)), Kind("dies", make, (die,)), Kind("is right", make, (str,))]
    counts = fuzz(kinds, minutes=1, inputs=6, seed=0)
    assert {name: dict(count) for name, count in counts.items()} == {
        "fails": {"traceback": 2},
        "dies": {"died": 2},
        "is right": {"accepted": 2},
    }
