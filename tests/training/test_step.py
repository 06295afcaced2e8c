"""A step lets the device work ahead: it asks for numbers once."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode

from crate_mae.data import evaluation_transform, open_source
from crate_mae.data.dataset import load
from crate_mae.training import images, loop
from crate_mae.training.images import open_images, training_batches
from crate_mae.training.loop import training_step
from crate_mae.training.model_state import build_model_state
from crate_mae.training.pretraining import Pretraining
from crate_mae.training.processes import Agreement, agree


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_a_step_asks_for_no_number_but_where_processes_agree(config, tiny_model, accelerator, monkeypatch, mask_tokens):
    """Tensors without values refuse whatever depends on a value: that is what a GPU would be waited for."""
    options = dataclasses.replace(
        config, image_size=(8, 8), batch_size=6, accumulation=3, workers=0, mask_tokens=mask_tokens
    )
    task = Pretraining(options, open_images("digits"), tiny_model.config.replace(mask_tokens=mask_tokens))
    batches = training_batches(
        task.images.train, task.transform(), options, 0, rank=0, world_size=1, device=torch.device("cpu")
    )
    prepared = [next(batches) for _ in range(3)]
    asked = []

    def agreed(_accelerator, *, loss, grad_norm, **_rest):
        with pytest.raises(DataDependentOutputException):
            loss.tolist()
        asked.append((loss.shape, grad_norm.shape))
        return Agreement(1.0, 1.0, 0, 0, False)

    monkeypatch.setattr(loop, "agree", agreed)
    monkeypatch.setattr(accelerator, "prepare_model", lambda model: model)  # it moves it, which such tensors do not
    without_values = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(without_values):
        task.model = copy.deepcopy(task.model)
    with without_values:
        model_state = build_model_state(task, accelerator)
        fake = (batch._replace(images=without_values.from_tensor(batch.images)) for batch in prepared)
        training_step(task, accelerator, model_state, fake, 0, stop=0, save=False)
    assert asked == [((), ())]
    assert len(model_state.optimizer.state) > 20  # it has stepped


@pytest.mark.parametrize(("device", "is_pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_pinned_where_they_are_copied_to_cuda(
    config, tiny_model, accelerator, monkeypatch, device, is_pinned
):
    asked = {}
    monkeypatch.setattr(images, "load", lambda *_, **options: asked.update(options) or (x for x in ()))
    monkeypatch.setattr(Accelerator, "device", torch.device(device))
    task = Pretraining(dataclasses.replace(config, image_size=(8, 8)), open_images("digits"), tiny_model.config)
    assert list(loop._batches(task, accelerator, 0)) == []
    assert asked["pin_memory"] is is_pinned


@pytest.mark.parametrize("kinds", [("8 bits",), ("16 bits",), ("8 bits", "16 bits")])
def test_pixels_travel_as_they_are_and_are_normalised_as_each_image_would_be(config, monkeypatch, kinds):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    of = {"8 bits": (4 * levels).astype(np.uint8), "16 bits": 1000 * levels}
    source = open_source([of[kinds[i % len(kinds)]] for i in range(6)])
    transform = evaluation_transform((8, 8), 1, (0.3,), (0.7,))
    travelled = []

    def noted(*given, **options):
        for batch in load(*given, **options):
            travelled.append(batch.images.dtype)
            yield batch

    monkeypatch.setattr(images, "load", noted)
    options = dataclasses.replace(config, batch_size=6, workers=0, steps=1)
    device = torch.device("cpu")
    (batch,) = training_batches(source, transform, options, 0, rank=0, world_size=1, device=device)
    assert travelled == [torch.uint8 if kinds == ("8 bits",) else torch.float32]
    expected = torch.stack([transform(source.read(int(i))) for i in batch.indices])
    assert torch.equal(batch.images, expected)


@pytest.mark.parametrize("norm", [3.25, float("inf")])
def test_what_is_agreed_is_what_was_found(accelerator, norm):
    agreed = agree(accelerator, loss=torch.tensor(1.5), grad_norm=torch.tensor(norm), bad_images=2, stop=15, save=True)
    assert agreed == Agreement(loss=1.5, grad_norm=norm, bad_images=2, stop=15, save=True)
