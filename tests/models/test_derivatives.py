"""A white box is differentiable and traceable everywhere: `torch.func`, second derivatives, `torch.fx`, ONNX."""

import subprocess
import sys

import pytest
import timm
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import crate_mae
from crate_mae.models.layers import ISTA, MSSA
from crate_mae.models.masking import random_mask, visible_indices
from crate_mae.models.monotone import BoundedISTA, Compression, Decompression

# PyTorch's own, when it first needs a forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TINY = {"in_chans": 1, "embed_dim": 12, "num_heads": 3, "depth": 2}
ENCODERS = ("crate_mae_nano_patch2_8", "crate_mae_nano_monotone_patch2_8")
AUTOENCODERS = (*ENCODERS, "crate_mae_nano_visible_patch2_8", "crate_mae_nano_compressing_patch2_8")
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(3)
    return timm.create_model(request.param, **TINY).double()


@pytest.fixture(params=AUTOENCODERS)
def autoencoder(request):
    torch.manual_seed(3)
    return crate_mae.create_model(request.param, **TINY, decoder_depth=1).double()


LAYERS = {
    "MSSA": lambda: MSSA(6, 2),
    "tied MSSA": lambda: MSSA(6, 2, output_projection="tied"),
    "ISTA": lambda: ISTA(5, step_size=0.3, threshold=0.1),
    "Compression": lambda: Compression(6, 2),
    "Decompression": lambda: Decompression(6, 2),
    "BoundedISTA": lambda: BoundedISTA(5, step_size=0.3, threshold=0.1),
    "BoundedISTA of one step": lambda: BoundedISTA(5, step_size=0.3, threshold=0.1, steps=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives_of_layers_are_right(name):
    """For the tokens and all parameters; of U the gradient is passed on by definition, so it is held fixed."""
    torch.manual_seed(5)
    layer = LAYERS[name]().double()
    if isinstance(layer, BoundedISTA):
        layer.dictionary.data = torch.randn(5, 5) * 0.2  # inside the bound
    fixed = {"subspaces.weight"} if isinstance(layer, Compression) else set()
    names = [key for key, _ in layer.named_parameters() if key not in fixed]
    values = [layer.get_parameter(key).detach().double().requires_grad_() for key in names]
    x = torch.randn(2, 4, 6 if "ISTA" not in name else 5, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(function, (x, *values), check_forward_ad=True)
    assert gradgradcheck(function, (x, *values), check_fwd_over_rev=True)
    output = function(x, *values)
    several = vmap(lambda g: torch.autograd.grad(output, x, g, retain_graph=True)[0])(torch.stack([output, -output]))
    expected = torch.autograd.grad(output, x, output.detach())[0]
    torch.testing.assert_close(several, torch.stack([expected, -expected]))


def test_a_bound_that_is_active_leaves_second_derivatives_in_tokens_right():
    torch.manual_seed(5)
    layer, x = BoundedISTA(5).double(), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    layer.dictionary.data *= 3
    assert gradgradcheck(lambda x: layer(x).square(), (x,))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transforms_agree_with_autograd(encoder, mode):
    getattr(encoder, mode)()
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}

    def loss(parameters, images):
        return functional_call(encoder, parameters, (images,)).pow(3).sum()

    loss_of_one = [torch.autograd.grad(encoder(x[None]).pow(3).sum(), [*encoder.parameters()]) for x in IMAGES]
    per_sample = vmap(grad(lambda p, x: loss(p, x[None])), (None, 0))(parameters, IMAGES)
    for found, *ones in zip(per_sample.values(), *loss_of_one, strict=True):
        torch.testing.assert_close(found, torch.stack(ones), rtol=1e-6, atol=1e-9)

    direction = torch.randn_like(IMAGES)
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(images).pow(3).sum(), images, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), images)
    of_images = grad(lambda images: loss(parameters, images))
    torch.testing.assert_close(of_images(IMAGES), gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(jvp(of_images, (IMAGES,), (direction,))[1], product, rtol=1e-6, atol=1e-9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(encoder(forward_ad.make_dual(IMAGES, direction))).tangent
    torch.testing.assert_close(tangent, jvp(encoder, (IMAGES,), (direction,))[1])


def test_jacobians_and_hessians_of_an_encoder(encoder):
    image = IMAGES[:1]
    by_rows, by_columns = (take(lambda x: encoder(x)[0, :3])(image) for take in (jacrev, jacfwd))
    torch.testing.assert_close(by_rows, by_columns)
    curvature = hessian(lambda x: encoder(x).pow(3).sum())(image).reshape(64, 64)
    torch.testing.assert_close(curvature, curvature.T)
    assert curvature.abs().max() > 0


def test_an_autoencoder_has_gradients_per_sample_and_second_derivatives(autoencoder):
    mask = random_mask(3, 16, 0.75, torch.Generator().manual_seed(1))
    parameters = {name: p.detach() for name, p in autoencoder.named_parameters()}

    def loss(parameters, x, mask, visible):
        given = {"mask": mask[None], "visible": visible[None]}
        return functional_call(autoencoder, parameters, (x[None],), given).loss

    found = vmap(grad(loss), (None, 0, 0, 0))(parameters, IMAGES, mask, visible_indices(mask))
    own = [*autoencoder.parameters()]
    total = autoencoder(IMAGES, mask=mask).loss
    expected = torch.autograd.grad(total, own, create_graph=True)
    for per_sample, mean in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(per_sample.mean(0), mean, rtol=1e-6, atol=1e-9)
    products = torch.autograd.grad(sum(g.square().sum() for g in expected), own)
    assert all(product.isfinite().all() for product in products)
    if autoencoder.config.mask_tokens == "decoder":
        with pytest.raises(crate_mae.UserError, match="visible_indices"):
            vmap(lambda x, mask: autoencoder(x[None], mask=mask[None]).loss)(IMAGES, mask)


def test_half_precision_under_autocast_has_second_derivatives_too(encoder):
    encoder, images = encoder.float(), IMAGES.float().requires_grad_()
    products = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = encoder(images)
        (gradient,) = torch.autograd.grad(output.float().pow(3).mean(), images, create_graph=True)
        products.append(torch.autograd.grad(gradient.square().sum(), images)[0])
    assert torch.nn.functional.cosine_similarity(*(p.flatten() for p in products), dim=0) > 0.97


# In a process of its own, where no shapes are checked: what these checks add to a program cannot be traced.
TRACED = f"""
import io, torch, timm, onnxruntime, crate_mae
from torchvision.models.feature_extraction import create_feature_extractor
from timm.models._features_fx import FeatureGraphNet

images = torch.randn(2, 1, 8, 8)
for name in {(*ENCODERS, "vit_mae_nano_patch2_8")}:
    encoder = timm.create_model(name, **{TINY | {"depth": 1}}).eval()
    expected = encoder(images)
    graph = torch.fx.symbolic_trace(encoder)
    assert torch.equal(graph(images), expected)
    assert torch.equal(graph(images.flip(0)), encoder(images.flip(0)))
    if name.startswith("crate"):
        maps = create_feature_extractor(encoder, ["blocks.0.add", "blocks.0"])(images)
        with crate_mae.trace(encoder, ["blocks.0.z_half", "blocks.0.code"]) as record:
            encoder(images)
        for key, name_of_ours in (("blocks.0.add", "blocks.0.z_half"), ("blocks.0", "blocks.0.code")):
            assert torch.equal(maps[key], record[name_of_ours][0])
        gradient, expected_gradient = (
            torch.autograd.grad(net(images).pow(3).sum(), [*net.parameters()]) for net in (graph, encoder)
        )
        torch.testing.assert_close(gradient, expected_gradient)
    tokens = FeatureGraphNet(encoder, out_indices=(0,), out_map=["blocks.0"])(images)
    assert [x.shape for x in tokens] == [(2, 17, 12)]
    for dynamo in (True, False) if name.startswith("crate") else ():
        file = io.BytesIO()
        if dynamo:
            torch.onnx.export(encoder, (images,), dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(encoder, (images,), file, dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue())
        (found,) = session.run(None, {{session.get_inputs()[0].name: images.numpy()}})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=2e-5)
    print("agrees", name)
"""


def test_fx_and_both_exporters_to_onnx_read_the_encoders_of_timm():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACED], capture_output=True, text=True, timeout=600)
    assert done.stdout.count("agrees") == 3, done.stderr[-2000:]
