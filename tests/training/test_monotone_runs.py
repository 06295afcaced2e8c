"""A run of monotone layers, sharded and compiled: its subspaces stay orthogonal."""

import crate_mae
from crate_mae.models.monotone import OrthogonalSubspaces
from crate_mae.theory.subspaces import distance_from_orthogonal
from tests.training.real_processes import MONOTONE, finish, largest_difference, sharded


def furthest_from_orthogonal(run):
    modules = [m for m in crate_mae.load(run).modules() if isinstance(m, OrthogonalSubspaces)]
    assert len(modules) == 4
    return max(float(distance_from_orthogonal(m.weight.detach())) for m in modules)


def test_two_processes_that_share_a_compiled_model_have_the_weights_of_one(tmp_path, driver):
    options = (MONOTONE, "steps=6", "monitor_steps=3")
    one = driver("pretrain", tmp_path / "one", *options)
    two = ("pretrain", tmp_path / "two", *options, "grad_checkpointing=true", "compile=true")
    finish(driver(*two, environments=sharded(2)))
    finish(one)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert furthest_from_orthogonal(tmp_path / "one") < 1e-3
    assert furthest_from_orthogonal(tmp_path / "two") < 1e-2
