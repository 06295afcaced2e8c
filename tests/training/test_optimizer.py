import pytest
import torch
from torch import nn

from crate_mae.private_torch import FakeTensorMode
from crate_mae.training.optimizer import adamw, build_optimizer


def test_vectors_and_named_parameters_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    model[2].weight.requires_grad_(False)
    token = nn.Parameter(torch.zeros(1, 1, 5))
    model.register_parameter("token", token)
    model.no_weight_decay = lambda: {"token"}
    spared, decayed = build_optimizer(model, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert {id(p) for p in spared["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), token)}


def test_every_parameter_of_a_model_is_in_exactly_one_group(tiny_model):
    optimizer = build_optimizer(tiny_model, 0.05)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in tiny_model.parameters())
    spared = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(tiny_model.mask_token) in spared
    assert id(tiny_model.encoder.cls_token) in spared
    assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", True), ("meta", None)])
def test_the_optimizer_is_one_kernel_on_cuda_and_cpus(device, fused):
    with FakeTensorMode():  # a tensor without numbers is on CUDA also where there is none
        parameter = nn.Parameter(torch.empty(3, device=device))
    assert adamw([{"params": [parameter]}], (0.9, 0.95)).defaults["fused"] is fused
