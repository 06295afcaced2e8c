import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crate_mae.errors import UserError
from crate_mae.models import build, create_model
from crate_mae.models.checkpoints import named_checkpoint, newest_checkpoint
from crate_mae.models.weights import load
from crate_mae.training import checkpoint
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.model_state import ModelState, average_of
from crate_mae.training.optimizer import build_optimizer

STATE = TrainState(step=7, skipped=2, skipped_in_a_row=1, loss_sum=0.1 + 0.2, loss_count=3, images=41, world_size=2)


def model_state_of(model, ema=0.0):
    optimizer = build_optimizer(model, 0.05)
    return ModelState(model, model, optimizer, average_of(model, ema))


def train(model_state, steps):
    model, optimizer = model_state.model, model_state.optimizer
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(5, 1, 8, 8, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        model.train()(images, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model_state.move_average(seed + 1)


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def saved(tmp_path, tiny_model):
    """A model after three steps with its optimizer, and its checkpoint."""
    model_state = model_state_of(tiny_model)
    train(model_state, 3)
    return model_state, checkpoint.write(tmp_path, checkpoint.gather(model_state), tiny_model.config, STATE)


def untrained(model_state, ema=0.0):
    """Another model of the same kind with its optimizer."""
    return model_state_of(build(model_state.model.config), ema)


def test_a_model_read_back_goes_on_bit_for_bit(saved):
    model_state, folder = saved
    other = untrained(model_state)
    assert not equal(model_state.model, other.model)
    assert checkpoint.read(folder, other) == STATE
    train(model_state, 2)
    train(other, 2)
    assert equal(model_state.model, other.model)


def test_with_an_average_the_checkpoint_is_the_average_and_goes_on_from_the_weights(tmp_path, tiny_model):
    model_state = model_state_of(tiny_model, ema=0.9)
    train(model_state, 4)
    folder = checkpoint.write(tmp_path, checkpoint.gather(model_state), tiny_model.config, STATE)
    assert not equal(model_state.kept, model_state.model)
    assert equal(load(folder), model_state.kept)
    other = untrained(model_state, ema=0.9)
    checkpoint.read(folder, other)
    train(model_state, 2)
    train(other, 2)
    assert equal(model_state.model, other.model) and equal(model_state.kept, other.kept)


def test_a_checkpoint_is_a_model_without_pickles(saved):
    model_state, folder = saved
    assert equal(load(folder), model_state.model)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["SHA256SUMS", "config.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_an_optimizer_that_never_stepped_is_saved_as_such(tmp_path, tiny_model):
    model_state = model_state_of(tiny_model)
    folder = checkpoint.write(tmp_path, checkpoint.gather(model_state), tiny_model.config, STATE)
    other = untrained(model_state)
    checkpoint.read(folder, other)
    assert equal(other.model, tiny_model)
    assert not model_state.optimizer.state and not other.optimizer.state


def test_the_last_two_written_are_kept_and_the_last_is_named(saved, tmp_path):
    model_state, _ = saved
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert newest_checkpoint(run) is None
    checkpoints.mkdir(parents=True)
    for left in (".step-8.tmp", ".step-8.former"):
        (checkpoints / left).mkdir()
    for step in (9, 200, 10, 100):
        checkpoint.write(checkpoints, checkpoint.gather(model_state), model_state.model.config, TrainState(step=step))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last", "step-10", "step-100"]
    assert newest_checkpoint(run) == checkpoints / "step-100"


def test_the_best_is_kept_beside_them_and_named(saved, tmp_path):
    model_state, _ = saved
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    state = TrainState()
    for step, score in ((1, 0.3), (2, 0.5), (3, 0.5), (4, None), (5, 0.4)):
        state.step = step
        assert state.note_score(score) == (step <= 2)
        checkpoint.write(checkpoints, checkpoint.gather(model_state), model_state.model.config, state)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "last", "step-2", "step-4", "step-5"]
    assert named_checkpoint(run, "best") == checkpoints / "step-2"
    assert checkpoint.read(checkpoints / "step-5", untrained(model_state)) == state


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_that_is_cut_short_is_refused(saved, name):
    model_state, folder = saved
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        checkpoint.read(folder, untrained(model_state))


def test_another_models_checkpoint_is_refused(saved):
    model_state, folder = saved
    name = model_state.model.config.name
    wider = create_model(name, in_chans=1, embed_dim=32, num_heads=2, depth=2, decoder_depth=2)
    with pytest.raises(UserError, match="of another model"):
        checkpoint.read(folder, model_state_of(wider))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "encoder.blocks.0.attn.rate_logit": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="monotone layers of an earlier version, which allowed kappa below 1/2"):
        checkpoint.read(folder, untrained(model_state))
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(UserError, match="another version"):
        checkpoint.read(folder, model_state)


def test_skipped_steps_are_counted():
    state = TrainState()
    for loss in (1.0, float("nan"), float("nan"), 2.0):
        state.count(loss, loss == loss)
    assert (state.step, state.skipped, state.skipped_in_a_row, state.loss_sum) == (4, 2, 0, 3.0)
