"""Two ways to trade: gradient checkpointing for less memory, and the whole forward pass as one compiled graph."""

import subprocess
import sys

import pytest
import torch

from crate_mae.models import create_model
from crate_mae.models.masking import random_mask

TINY = {"in_chans": 1, "embed_dim": 24, "num_heads": 2, "depth": 2, "decoder_depth": 3}
NAMES = (
    "crate_mae_nano_patch2_8",
    "crate_mae_nano_visible_patch2_8",
    "crate_mae_nano_compressing_patch2_8",
    "crate_mae_nano_monotone_patch2_8",
    "vit_mae_nano_patch2_8",
)


def gradients(model, images, mask):
    model.zero_grad()
    model(images, mask=mask).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_computed_again_give_the_same_gradients(name):
    size = {"decoder_embed_dim": 24, "decoder_num_heads": 2} if name.startswith("vit") else {}
    model = create_model(name, **TINY, **size).train()
    images, mask = torch.randn(5, 1, 8, 8), random_mask(5, 16, 0.75)
    calls = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, _inputs: calls.append(layer))
    expected = gradients(model, images, mask)
    assert len(calls) == 5
    model.set_grad_checkpointing()
    found = gradients(model, images, mask)
    assert len(calls) == 5 + 2 * 5
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-6)
    model.eval()(images, mask=mask)
    assert len(calls) == 5 + 2 * 5 + 5


# In a process of its own, since the shape checks of the tests are no part of the graph. A layer of each side will do,
# and one model of each kind of pass and of layer: others are traced alike, and tracing takes all the time.
TRACED = (NAMES[0], *NAMES[3:])
COMPILE = f"""
import torch
from crate_mae.models import create_model
from crate_mae.models.masking import random_mask, visible_indices

torch.manual_seed(0)
for name in {TRACED}:
    size = {{"decoder_embed_dim": 24, "decoder_num_heads": 2}} if name.startswith("vit") else {{}}
    model = create_model(name, **{TINY | {"depth": 1, "decoder_depth": 1}}, **size).train()
    images, mask = torch.randn(5, 1, 8, 8), random_mask(5, 16, 0.75)
    model(images, mask=mask).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(name == {NAMES[0]!r})
    # Of one model the backward pass is traced, too; the graphs of the others are run as they are.
    model.compile(backend="aot_eager" if name == {NAMES[3]!r} else "eager", fullgraph=True)
    model(images, mask=mask, visible=visible_indices(mask)).loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-6)
    print("agrees", name)
"""


def test_the_forward_pass_of_pretraining_is_one_graph():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[:-1] == [f"agrees {name}" for name in TRACED], done.stderr[-2000:]
