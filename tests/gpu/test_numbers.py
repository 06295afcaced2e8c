"""A GPU computes the numbers of the CPU: losses and gradients of every kind of layer and model.

The reference is the CPU in float64, so that a rehearsal on the CPU checks the tolerances, too. There, over four seeds,
errors were at most 3e-7 and 3e-6 in float32, and 7e-3 and 0.15 in bfloat16.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crate_mae.models import create_model
from crate_mae.models.masking import random_mask
from crate_mae.models.monotone import BoundedISTA, retract_
from crate_mae.training.preflight import autocast

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"depth": 2, "decoder_depth": 1, "image_size": (10, 14)}  # 5 x 7 patches of 2 pixels
MODELS = {
    "published": ("crate_mae_nano_patch2_8", {}),
    "published, tied": ("crate_mae_nano_patch2_8", {"output_projection": "tied"}),
    "overcomplete": ("crate_mae_nano_patch2_8", {"overcomplete": 2, "ista_skip": True}),
    "visible": ("crate_mae_nano_visible_patch2_8", {}),
    "compressing": ("crate_mae_nano_compressing_patch2_8", {}),
    "monotone": ("crate_mae_nano_monotone_patch2_8", {}),
    "monotone, mask tokens at the encoder": ("crate_mae_nano_monotone_patch2_8", {"mask_tokens": "encoder"}),
    "ViT": ("vit_mae_nano_patch2_8", {}),
}
# Largest errors of the loss, and of the gradient of any parameter in relation to its norm.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 0.3)}


@pytest.fixture(params=MODELS)
def model(request):
    name, settings = MODELS[request.param]
    torch.manual_seed(0)
    model = create_model(name, **SIZE, **settings).train()
    retract_(model)
    for module in model.modules():
        if isinstance(module, BoundedISTA):  # D starts at its bound, where rounding decides which gradient it has
            module.dictionary.data.mul_(1.1)
    return model


def loss_and_gradients(model, images, mask, device, dtype, precision):
    model.to(device, dtype).zero_grad()
    with torch.backends.cudnn.flags(allow_tf32=False):  # by default its convolutions round float32 to TF32
        with autocast(device, precision):
            output = model(images.to(device, dtype), mask=mask.to(device))
        output.loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return output.loss.item(), gradients


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_and_gradients_are_those_of_the_cpu_in_float64(device, model, precision):
    generator = torch.Generator().manual_seed(0)
    images, mask = torch.randn(3, 3, 10, 14, generator=generator), random_mask(3, 35, 0.75, generator)
    loss, gradients = loss_and_gradients(model, images, mask, device, torch.float32, precision)
    exact_loss, exact = loss_and_gradients(model, images, mask, torch.device("cpu"), torch.float64, "float32")
    of_loss, of_gradient = TOLERANCES[precision]
    assert loss == pytest.approx(exact_loss, rel=of_loss)
    errors = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in exact.items() if g.norm() > 0}
    assert len(errors) > 10
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < of_gradient, f"the gradient of {worst} is {errors[worst]:.2g} off"


# In a process of its own, since the shape checks of the tests are no part of the graph.
COMPILE = """
import sys
import torch
from crate_mae.models import create_model
from crate_mae.models.masking import random_mask, visible_indices
from crate_mae.models.monotone import retract_

name, device, backend = sys.argv[1:]
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
model = create_model(name, depth=1, decoder_depth=1).to(device).train()
retract_(model)
images, mask = torch.randn(5, 3, 8, 8, device=device), random_mask(5, 16, 0.75)
given = {"mask": mask.to(device), "visible": visible_indices(mask).to(device)}
loss = model(images, **given).loss
loss.backward()
expected = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model.compile(backend=backend, fullgraph=True)
compiled = model(images, **given).loss
compiled.backward()
torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
for p, grad in zip(model.parameters(), expected, strict=True):
    assert (p.grad - grad).norm() <= 1e-3 * grad.norm() + 1e-7
print("agrees")
"""


@pytest.mark.parametrize("kind", ["published", "monotone", "ViT"])
def test_the_compiled_step_is_one_graph_with_the_same_gradients(device, kind):
    """On the CPU both passes are traced, but no machine code is made of them."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    command = [sys.executable, "-c", COMPILE, MODELS[kind][0], device.type, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout == "agrees\n", done.stderr[-2000:]
