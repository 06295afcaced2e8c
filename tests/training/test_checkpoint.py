import json

import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.models import build, create_model
from crate_mae.models.weights import load
from crate_mae.training import checkpoint
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.optimizer import build_optimizer

STATE = TrainState(step=7, skipped=2, skipped_in_a_row=1, loss_sum=0.1 + 0.2, loss_count=3, images=41, world_size=2)


def train(model, optimizer, steps):
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(5, 1, 8, 8, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        model.train()(images, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def saved(tmp_path, tiny_model):
    """A model after three steps, its optimizer, and its checkpoint."""
    optimizer = build_optimizer(tiny_model, 0.05)
    train(tiny_model, optimizer, 3)
    folder = checkpoint.write(tmp_path, checkpoint.gather(tiny_model, optimizer), tiny_model.config, STATE)
    return tiny_model, optimizer, folder


def fresh(model):
    """Another model of the same kind with its optimizer."""
    other = build(model.config)
    return other, build_optimizer(other, 0.05)


def test_a_model_read_back_goes_on_bit_for_bit(saved):
    model, optimizer, folder = saved
    other, other_optimizer = fresh(model)
    assert not equal(model, other)
    assert checkpoint.read(folder, other, other_optimizer) == STATE
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert equal(model, other)


def test_a_checkpoint_is_a_model_without_pickles(saved):
    model, _, folder = saved
    assert equal(load(folder), model)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_an_optimizer_that_never_stepped_is_saved_as_such(tmp_path, tiny_model):
    optimizer = build_optimizer(tiny_model, 0.05)
    folder = checkpoint.write(tmp_path, checkpoint.gather(tiny_model, optimizer), tiny_model.config, STATE)
    other, other_optimizer = fresh(tiny_model)
    checkpoint.read(folder, other, other_optimizer)
    assert equal(other, tiny_model)
    assert not optimizer.state and not other_optimizer.state


def test_the_last_two_written_are_kept_and_the_last_is_named(saved, tmp_path):
    model, optimizer, _ = saved
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert checkpoint.newest_checkpoint(run) is None
    checkpoints.mkdir(parents=True)
    (checkpoints / ".step-8.tmp").mkdir()
    for step in (9, 200, 10, 100):
        snapshot = checkpoint.gather(model, optimizer)
        checkpoint.write(checkpoints, snapshot, model.config, TrainState(step=step))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last", "step-10", "step-100"]
    assert checkpoint.newest_checkpoint(run) == checkpoints / "step-100"
    (checkpoints / "step-100").rename(checkpoints / "gone")
    with pytest.raises(UserError, match='"step-100", which is not there'):
        checkpoint.newest_checkpoint(run)
    (checkpoints / "last").write_text("")  # as a power cut may leave it
    with pytest.raises(UserError, match='"", which is not there'):
        checkpoint.newest_checkpoint(run)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_that_is_cut_short_is_refused(saved, name):
    model, _, folder = saved
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        checkpoint.read(folder, *fresh(model))


def test_another_models_checkpoint_is_refused(saved):
    model, optimizer, folder = saved
    wider = create_model(model.config.name, in_chans=1, embed_dim=32, num_heads=2, depth=2, decoder_depth=2)
    with pytest.raises(UserError, match="of another model"):
        checkpoint.read(folder, wider, build_optimizer(wider, 0.05))
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(UserError, match="another version"):
        checkpoint.read(folder, model, optimizer)


def test_skipped_steps_are_counted():
    state = TrainState()
    for loss in (1.0, float("nan"), float("nan"), 2.0):
        state.count(loss, loss == loss)
    assert (state.step, state.skipped, state.skipped_in_a_row, state.loss_sum) == (4, 2, 0, 3.0)
