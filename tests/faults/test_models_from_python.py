"""What commands and methods do with a model of the caller: nothing that is seen afterwards, and nothing that settings
of the caller change."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import crate_mae
from crate_mae.evaluation.reconstruction import LARGEST_PSNR, completion_quality, completion_scores
from crate_mae.models.classifier import build_classifier
from crate_mae.models.completion import Completion
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.masking import patchify, random_mask, unpatchify

SMALL = {"in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture
def images(tmp_path):
    """Two folders of two classes, of other images."""
    for number, name in enumerate(["train/a", "train/b", "val/a", "val/b"]):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = crate_mae.create_model("crate_mae_nano_patch2_8", **SMALL)
    net.encoder.blocks[0].eval()  # a part that the caller keeps as it is
    net.mask_token.requires_grad_(False)
    return net


@pytest.fixture
def classifier(model):
    return build_classifier(ClassifierConfig(encoder=model.config, classes=("a", "b")))


def state(net):
    """Everything about a model that a caller may have set."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {
        "modes": [module.training for module in net.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
        "tensors": [(name, id(x), x.dtype, x.device, x.requires_grad, x.grad, x._version) for name, x in tensors],
        "generator": torch.get_rng_state().tolist(),
        "settings": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    }


@contextlib.contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "float64": default_float64,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


def features(net, images):
    path = images / f"{len(list(images.iterdir()))}.npy"
    crate_mae.embed(net, images / "train", out=path, workers=0)
    return np.load(path).tolist()


def report_of(command, net, images, **options):
    path = images / f"{len(list(images.iterdir()))}.json"
    command(net, out=path, **options)
    return json.loads(path.read_text())["results"]


CALLS = {
    "embed": lambda m, _, images: features(m, images),
    "MaskedAutoencoder.embed": lambda m, _, images: m.embed(images / "train" / "a" / "0.png").tolist(),
    "eval_knn": lambda m, _, images: report_of(
        crate_mae.eval_knn, m, images, train=images / "train", val=images / "val", k=2, workers=0
    ),
    "eval_reconstruction": lambda m, _, images: report_of(
        crate_mae.eval_reconstruction, m, images, data=images / "train", mask_ratios=(0.5, 0.75)
    ),
    "completion_scores": lambda m, _, images: repr(
        completion_scores(m, torch.full((2, 1, 8, 8), 0.25, dtype=torch.float32), [0.5])
    ),
    "reconstruct": lambda m, _, images: (
        crate_mae.reconstruct(m, images / "val", out=images / "r.png", overwrite=True).psnr
    ),
    "predict": lambda _, c, images: (
        crate_mae.predict(c, images / "val", out=images / "p.csv", overwrite=True).probability
    ),
    "viz_pca": lambda m, _, images: crate_mae.viz_pca(
        m, images / "val", out=images / "v.png", count=2, overwrite=True
    ).path.read_bytes(),
    "random_mask": lambda *_: random_mask(2, 16, 0.75, torch.Generator().manual_seed(0)).tolist(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_the_model_and_pytorch_as_they_were_and_depends_on_neither(call, model, classifier, images):
    before = state(model), state(classifier)
    found = CALLS[call](model, classifier, images)
    assert (state(model), state(classifier)) == before
    for name, surroundings in SURROUNDINGS.items():
        with surroundings():
            before = state(model), state(classifier)
            assert CALLS[call](model, classifier, images) == found, name
            assert (state(model), state(classifier)) == before, name


def test_a_model_in_half_precision_is_embedded(model, images):
    half = features(model.to(torch.bfloat16), images)
    np.testing.assert_allclose(half, features(model.float(), images), atol=0.1)


def test_a_model_in_half_precision_completes_images(model, images):
    picture = images / "r.png"
    half = crate_mae.reconstruct(model.to(torch.bfloat16), images / "val", out=picture).psnr
    whole = crate_mae.reconstruct(model.float(), images / "val", out=picture, overwrite=True).psnr
    np.testing.assert_allclose(half, whole, atol=0.2)


def test_a_run_does_not_depend_on_settings_of_the_program_around_it(images):
    def weights():
        out = images / f"run{len(list(images.iterdir()))}"
        crate_mae.pretrain(
            str(images / "train"),
            out=out,
            model="crate_mae_nano_patch2_8",
            model_settings={"embed_dim": 24, "depth": 1, "num_heads": 3, "decoder_depth": 1},
            val=str(images / "val"),
            steps=1,
            batch_size=2,
            precision="float32",
            workers=0,
            trackers=(),
            quiet=True,
        )
        return (out / "model.safetensors").read_bytes()

    before = torch.get_rng_state()
    found = weights()
    assert torch.equal(torch.get_rng_state(), before)
    with default_float64(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert weights() == found
        assert torch.get_default_dtype() == torch.float64


WRAPPED = {
    "compiled": torch.compile,
    "data parallel": torch.nn.DataParallel,
    "both": lambda net: torch.nn.DataParallel(torch.compile(net)),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_model_is_saved_as_the_model_inside(wrapper, model, tmp_path):
    crate_mae.save(WRAPPED[wrapper](model), tmp_path)
    for name, value in crate_mae.load(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_model_with_compiled_parts_is_saved(model, tmp_path):
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    model.encoder = torch.compile(model.encoder)
    model.decoder.blocks[0] = torch.compile(model.decoder.blocks[0])
    crate_mae.save(model, tmp_path)
    assert crate_mae.load(tmp_path).state_dict().keys() == plain.keys()


def without_a_layer(net):
    net.encoder.blocks.pop(0)
    return net


def with_nan(net):
    net.mask_token.data[0, 0, 0] = math.nan
    return net


def parametrized(net):
    torch.nn.utils.parametrizations.weight_norm(net.decoder.pred)
    return net


UNLOADABLE = {
    "a layer less": without_a_layer,
    "NaN": with_nan,
    "a parametrization": parametrized,
    "8 bits": lambda net: net.to(torch.float8_e4m3fn),
    "no memory": lambda net: net.to("meta"),
    "another module": lambda _: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", UNLOADABLE)
def test_what_could_not_be_loaded_is_not_saved(kind, model, tmp_path):
    with pytest.raises(crate_mae.UserError):
        crate_mae.save(UNLOADABLE[kind](model), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_exact_completion_has_a_finite_psnr():
    picture = torch.rand(2, 1, 8, 8)
    mask = random_mask(2, 16, 0.5)
    other = unpatchify(torch.where(mask[..., None], patchify(picture, 2) * 0.9, patchify(picture, 2)), 2, (4, 4))
    exact = completion_quality(Completion(picture, picture, picture, picture), mask, 2)
    assert exact.psnr.tolist() == [LARGEST_PSNR] * 2
    assert completion_quality(Completion(picture, picture, other, other), mask, 2).psnr.max() < LARGEST_PSNR


def test_completions_that_are_not_finite_are_told(model):
    with pytest.raises(crate_mae.UserError, match="not finite"):
        completion_scores(with_nan(model), torch.zeros(1, 1, 8, 8), [0.5])


@pytest.mark.parametrize("ratio", [0.0, 0.94, 0.999, 1.0, -0.5, 2.0, math.nan, math.inf])
def test_a_ratio_hides_some_patches_and_leaves_some_visible(ratio, model, images):
    with pytest.raises(crate_mae.UserError, match="must hide some and leave some visible"):
        model(torch.zeros(1, 1, 8, 8), mask_ratio=ratio)
    with pytest.raises(crate_mae.UserError, match="must hide some and leave some visible"):
        crate_mae.reconstruct(model, images / "val", out=images / "r.png", mask_ratio=ratio)
    with pytest.raises(crate_mae.UserError, match="must hide some and leave some visible"):
        crate_mae.eval_reconstruction(model, images / "val", mask_ratios=(0.5, ratio))


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_mask_of_the_caller_may_hide_nothing_or_all(hidden, model):
    output = model(torch.zeros(1, 1, 8, 8), mask=torch.full((1, 16), hidden == 16))
    assert output.loss.isfinite()
