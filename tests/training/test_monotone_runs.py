"""Runs of monotone layers: their subspaces stay orthogonal, and a run of an earlier version continues as it was."""

import pytest

import crate_mae
from crate_mae.commands.train import pretrain, resume
from crate_mae.models.config import CrateConfig, ModelConfig
from crate_mae.models.monotone import OrthogonalSubspaces
from crate_mae.theory.subspaces import distance_from_orthogonal
from tests.training.conftest import TINY_MODEL, TINY_RUN, at_step, weights
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


def test_a_resumed_run_keeps_the_model_of_its_checkpoint(tmp_path, monkeypatch):
    """Also if its options make another model by now: in the first versions, monotone layers took one ISTA step."""
    options = TINY_RUN | {"model_settings": TINY_MODEL | {"layer": "monotone"}}
    monkeypatch.setattr(CrateConfig, "_usual", lambda config: ModelConfig._usual(config) | {"ista_steps": 1})
    whole = pretrain("digits:test", out=tmp_path / "whole", **options)
    at_step(monkeypatch, 10, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain("digits:test", out=tmp_path / "parts", **options, checkpoint_minutes=1e-6)
    monkeypatch.undo()
    resumed = resume(tmp_path / "parts", quiet=True)
    assert resumed.model().config.ista_steps == 1
    assert weights(resumed.path) == weights(whole.path)
