"""Runs of monotone layers: killed, shared among processes, compiled. Their subspaces are orthogonal all the same."""

import random
import signal

import pytest

import crate_mae
from crate_mae.models.monotone import OrthogonalSubspaces
from crate_mae.theory.subspaces import distance_from_orthogonal
from tests.training.real_processes import CPU, TORCHRUN, finish, largest_difference, sharded, wait_for

MONOTONE = "model_settings={embed_dim: 24, num_heads: 2, depth: 2, decoder_depth: 2, layer: monotone}"


def furthest_from_orthogonal(run):
    modules = [m for m in crate_mae.load(run).modules() if isinstance(m, OrthogonalSubspaces)]
    assert len(modules) == 4
    return max(float(distance_from_orthogonal(m.weight.detach())) for m in modules)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, driver):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = driver("pretrain", whole, MONOTONE, "drop_path=0.2")
    process = driver("pretrain", killed, MONOTONE, "drop_path=0.2", "checkpoint_minutes=0.0001", "pause=0.02")
    wait_for(process, f"step {random.Random(0).randint(5, 12)}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(driver("resume", killed))
    finish(uninterrupted)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert furthest_from_orthogonal(whole) < 1e-3


@pytest.mark.parametrize(
    ("launcher", "options"), [(TORCHRUN, ()), (sharded(2), ("grad_checkpointing=true", "compile=true"))]
)
def test_two_processes_have_the_weights_of_one(tmp_path, driver, launcher, options):
    one = driver("pretrain", tmp_path / "one", MONOTONE, "steps=6", "monitor_steps=3")
    finish(
        driver("pretrain", tmp_path / "two", MONOTONE, "steps=6", "monitor_steps=3", *options, launcher=launcher, **CPU)
    )
    finish(one)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert furthest_from_orthogonal(tmp_path / "two") < 1e-2
