"""A step lets the device work ahead: it asks for a number once."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from crate_mae.training import loop
from crate_mae.training import step as step_module
from crate_mae.training.images import open_images, training_batches
from crate_mae.training.pretraining import Pretraining
from crate_mae.training.processes import Agreement, agree
from crate_mae.training.step import training_step
from crate_mae.training.trainee import build_trainee

WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default", "aten.equal.default")


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_a_step_waits_for_the_device_where_processes_agree_and_nowhere_else(
    config, tiny_model, accelerator, monkeypatch, mask_tokens
):
    options = dataclasses.replace(
        config, image_size=(8, 8), batch_size=6, accumulation=3, workers=0, mask_tokens=mask_tokens
    )
    model = tiny_model.config.replace(mask_tokens=mask_tokens)
    task = Pretraining(options, open_images("digits"), model)
    trainee = build_trainee(task, accelerator)
    # On a CPU the optimizer counts its steps on the host; on CUDA it is fused, and does not.
    monkeypatch.setattr(trainee.accelerated, "step", lambda: None)
    masks = task.step_loss(0)  # drawn and counted on the CPU, whatever the device
    monkeypatch.setattr(task, "step_loss", lambda _step: masks)
    waits = Waits()

    def counting(*arguments, **options):
        waits.found.append("before agreeing" if waits.found else "agreeing")
        return agree(*arguments, **options)

    monkeypatch.setattr(step_module, "agree", counting)
    batches = training_batches(task.images.train, task.transform(), options, 0, rank=0, world_size=1, pin_memory=False)
    prepared = iter([next(batches) for _ in range(3)])
    with waits:
        result = training_step(task, accelerator, trainee, prepared, 0, stop=0, save=False)
    assert waits.found == ["agreeing"]
    assert result.is_finite and result.log.grad_norm > 0


@pytest.mark.parametrize(("device", "is_pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_pinned_where_they_are_copied_to_cuda(
    config, tiny_model, accelerator, monkeypatch, device, is_pinned
):
    asked = {}
    monkeypatch.setattr(loop, "training_batches", lambda *_, **options: asked.update(options) or (x for x in ()))
    monkeypatch.setattr(Accelerator, "device", torch.device(device))
    task = Pretraining(dataclasses.replace(config, image_size=(8, 8)), open_images("digits"), tiny_model.config)
    loop._batches(task, accelerator, 0)
    assert asked["pin_memory"] is is_pinned


def test_the_counter_of_waits_counts():
    with Waits() as waits:
        float(torch.ones(2).sum())
    assert waits.found == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("norm", [3.25, float("inf")])
def test_what_is_agreed_is_what_was_found(accelerator, norm):
    agreed = agree(accelerator, loss=torch.tensor(1.5), grad_norm=torch.tensor(norm), bad_images=2, stop=15, save=True)
    assert agreed == Agreement(loss=1.5, grad_norm=norm, bad_images=2, stop=15, save=True)
