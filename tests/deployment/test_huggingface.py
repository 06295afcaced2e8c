"""Models in transformers: round trips from local folders, without a network."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.deployment.card import LICENSE
from crate_mae.deployment.huggingface.configuration import CrateMAEConfig, autoencoder_config
from crate_mae.deployment.huggingface.modeling import CrateMAEBackbone, pretrained
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.models.classifier import build_classifier
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.masking import random_mask
from crate_mae.models.presets import preset
from tests.new_processes import failing

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "decoder_depth": 1, "image_size": (6, 10)}
NANO = "crate_mae_nano_patch2_8"
IMAGES = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "encoder": {"ista_skip": True, "threshold": 0.2},
    "decoder": {"mask_tokens": "decoder", "norm_pix_loss": True},
    "compressing": {"mask_tokens": "decoder", "layer": "compressing", "ista_skip": True},
    "monotone": {"mask_tokens": "decoder", "layer": "monotone"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def autoencoder(request, tmp_path_factory):
    """One of our models, and its folder for transformers."""
    torch.manual_seed(1)
    model = crate_mae.create_model(NANO, **SMALL, **SETTINGS[request.param]).eval()
    folder = tmp_path_factory.mktemp("hf") / request.param
    exported = crate_mae.export(model, out=folder, format="hf", verify=True)
    assert exported.largest_difference == 0
    return model, folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(1)
    config = ClassifierConfig(encoder=preset(NANO).replace(**SMALL), classes=("ant", "bee", "cat"), pooling="mean")
    model = build_classifier(config).eval()
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("hf") / "classifier"
    assert crate_mae.export(model, out=folder, format="hf", verify=True, license="mit").largest_difference == 0
    return model, folder


def test_no_layer_is_divided_among_devices(autoencoder):
    model = transformers.AutoModelForPreTraining.from_pretrained(autoencoder[1])
    layers = {type(module).__name__ for name, module in model.named_modules() if re.search(r"blocks\.\d+$", name)}
    assert len(layers) == 2  # of encoder and decoder
    assert layers <= set(model._no_split_modules)


@torch.no_grad()
def test_the_encoder_gives_our_features_at_any_size(autoencoder):
    model, folder = autoencoder
    theirs = transformers.AutoModel.from_pretrained(folder)
    output = theirs(IMAGES, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, model.encoder.forward_features(IMAGES))
    assert torch.equal(output.pooler_output, torch.cat([output[0][:, 0], output[0][:, 1:].mean(1)], dim=1))
    assert len(output.hidden_states) == 4 and output.attentions is None
    torch.testing.assert_close(theirs.encoder.norm(output.hidden_states[-1]), output.last_hidden_state)
    assert theirs(IMAGES, return_dict=False)[0].shape == (2, 16, 24)
    larger = torch.randn(1, 3, 8, 14)
    encoder = crate_mae.load(folder).encoder
    encoder.set_input_size((8, 14))
    torch.testing.assert_close(theirs(larger).last_hidden_state, encoder.forward_features(larger))


def test_hidden_states_and_attention_are_those_that_we_trace(autoencoder, classifier):
    for model, folder, kind in (
        (autoencoder[0], autoencoder[1], transformers.AutoModel),
        (autoencoder[0], autoencoder[1], transformers.AutoModelForPreTraining),
        (classifier[0], classifier[1], transformers.AutoModelForImageClassification),
    ):
        theirs = kind.from_pretrained(folder)
        is_masked = kind is transformers.AutoModelForPreTraining
        options = {"mask_ratio": 0.5} if is_masked else {}
        with crate_mae.trace(model.encoder, ["blocks.*.z_next", "blocks.*.attention"]) as record:
            model(IMAGES, **options) if kind is not transformers.AutoModel else model.encoder(IMAGES)
        output = theirs(IMAGES, **options, output_attentions=True, output_hidden_states=True)
        for found, what in ((output.attentions, "attention"), (output.hidden_states[1:], "z_next")):
            expected = [record[f"blocks.{i}.{what}"][0] for i in range(3)]
            torch.testing.assert_close([*found], expected, rtol=1e-5, atol=1e-6)
            sum(x.pow(3).sum() for x in found).backward(retain_graph=True)
        assert theirs.encoder.patch_embed.proj.weight.grad.abs().max() > 0
        theirs.config.output_hidden_states = True
        assert len(theirs(IMAGES, **options).hidden_states) == 4 and theirs(IMAGES, **options).attentions is None


@torch.no_grad()
def test_the_backbone_gives_maps_of_the_layers_that_are_asked_for(autoencoder, tmp_path):
    model, folder = autoencoder
    backbone = CrateMAEBackbone.from_pretrained(folder, out_features=["stem", "stage2"])
    assert backbone.channels == [24, 24] and backbone.out_indices == [0, 2]
    found = backbone(IMAGES).feature_maps
    (expected,) = model.encoder.forward_intermediates(IMAGES, indices=[1], norm=True, intermediates_only=True)
    torch.testing.assert_close(found[1], expected)
    assert [x.shape for x in found] == [(2, 24, 3, 5)] * 2
    output = CrateMAEBackbone.from_pretrained(folder)(torch.randn(1, 3, 8, 14), output_attentions=True)
    assert output.feature_maps[0].shape == (1, 24, 4, 7) and output.hidden_states is None
    assert [a.shape for a in output.attentions] == [(1, 3, 29, 29)] * 3
    backbone.save_pretrained(tmp_path)
    again = CrateMAEBackbone.from_pretrained(tmp_path)
    assert again.out_features == ["stem", "stage2"]
    torch.testing.assert_close([*again(IMAGES).feature_maps], [*found])
    automatic = transformers.AutoBackbone.from_config(backbone.config)
    automatic.load_state_dict(backbone.state_dict())
    torch.testing.assert_close([*automatic.eval()(IMAGES).feature_maps], [*found])
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        CrateMAEBackbone.from_pretrained(folder, out_features=["stage9"])


@torch.no_grad()
def test_the_autoencoder_masks_only_when_it_is_told_to(autoencoder):
    model, folder = autoencoder
    theirs = transformers.AutoModelForPreTraining.from_pretrained(folder)
    mask = random_mask(2, 15, 0.5, torch.Generator().manual_seed(3))
    expected = model(IMAGES, mask=mask)
    for given in (mask, mask.unflatten(1, (3, 5))):
        output = theirs(IMAGES, bool_masked_pos=given)
        assert torch.equal(output.logits, expected.prediction) and torch.equal(output.loss, expected.loss)
    assert not theirs(IMAGES).mask.any() and theirs(IMAGES).loss == 0
    assert torch.equal(theirs(IMAGES, mask_ratio=0.75).logits, model(IMAGES, mask_ratio=0.75).prediction)
    noise = torch.rand(2, 15)
    by_noise = theirs(IMAGES, noise=noise).mask
    with pytest.raises(UserError, match=r"noise is \(2, 10\), but these images have"):
        theirs(IMAGES, noise=noise[:, :10])
    assert torch.equal(by_noise.sum(1), torch.tensor([12, 12]))
    assert noise[0][by_noise[0]].min() > noise[0][~by_noise[0]].max()
    theirs.train()
    assert (theirs(IMAGES).mask.sum(1) == 12).all()


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.zeros(1, 3, 8, 14), {}, "this autoencoder takes"),
        (IMAGES, {"bool_masked_pos": torch.zeros(2, 14, dtype=torch.bool)}, "2 x 15 patches"),
        (IMAGES, {"mask_ratio": 1.0}, "mask_ratio is 1.0"),
    ],
)
def test_what_does_not_fit_is_told(autoencoder, images, options, words):
    theirs = transformers.AutoModelForPreTraining.from_pretrained(autoencoder[1])
    with pytest.raises(crate_mae.UserError, match=words):
        theirs(images, **options)


@torch.no_grad()
def test_the_classifier_keeps_its_classes(classifier):
    model, folder = classifier
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    output = theirs(IMAGES, labels=torch.tensor([0, 2]))
    assert torch.equal(output.logits, model(IMAGES))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 2])))
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"} and theirs.config.label2id["cat"] == 2
    ours = crate_mae.load(folder)
    assert ours.config == model.config
    assert torch.equal(ours(IMAGES), model(IMAGES))


def test_a_head_that_is_missing_starts_as_a_fresh_one(autoencoder):
    model, folder = autoencoder
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    assert theirs.head.weight.shape == (5, 48) and 0 < theirs.head.weight.std() < 1e-4
    assert not theirs.head.bias.any() and (theirs.norm.weight == 1).all()
    assert torch.equal(theirs(IMAGES, output_hidden_states=True).hidden_states[0][:, :1].detach(), _first(model))


def test_weights_of_earlier_monotone_layers_are_refused(tmp_path):
    folder = tmp_path / "earlier"
    crate_mae.export(crate_mae.create_model(NANO, **SMALL, **SETTINGS["monotone"]), out=folder, format="hf")
    transformers.AutoModelForPreTraining.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("excess_logit", "rate_logit"): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(crate_mae.UserError, match="earlier holds monotone layers of an earlier version"):
        transformers.AutoModelForPreTraining.from_pretrained(folder)


def _first(model):
    encoder = model.encoder
    return (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1).detach()


def test_the_pipeline_gives_our_features(autoencoder, tmp_path):
    model, folder = autoencoder
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    extract = transformers.pipeline("image-feature-extraction", model=str(folder))
    found = extract(str(tmp_path / "image.png"), pool=True, return_tensors=True)
    torch.testing.assert_close(found, model.embed([tmp_path / "image.png"]))
    tokens = extract(str(tmp_path / "image.png"), return_tensors=True)
    torch.testing.assert_close(tokens[:, 1:], model.embed([tmp_path / "image.png"], pooling="tokens"))


def test_the_processor_takes_what_programs_hold(classifier):
    processor = transformers.AutoImageProcessor.from_pretrained(classifier[1])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    expected = processor([Image.fromarray(image) for image in pixels])["pixel_values"]
    assert expected.shape == (2, 3, 6, 10)
    one_level = 1 / 255 / min(processor.image_std)  # arrays are resized as tensors, which round otherwise than Pillow
    for several in (pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2)):
        found = processor(several)["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * one_level)
    assert torch.equal(processor(Image.fromarray(pixels[0]))["pixel_values"], expected[:1])
    assert isinstance(processor(pixels, return_tensors="np")["pixel_values"], np.ndarray)


def test_saved_and_loaded_again(classifier, tmp_path):
    theirs = transformers.AutoModelForImageClassification.from_pretrained(classifier[1])
    theirs.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= {
        file.name for file in tmp_path.iterdir()
    }
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(IMAGES).logits, theirs(IMAGES).logits)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in text and again.config.run == {LICENSE: "mit"}


def test_every_card_runs(autoencoder, classifier, monkeypatch):
    for folder in (autoencoder[1], classifier[1]):
        monkeypatch.chdir(folder)
        code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        exec(code, names := {"image": Image.new("RGB", (20, 20))})
        assert "prediction" in names or names["classes"][0] in ("ant", "bee", "cat")


@torch.no_grad()
def test_a_folder_for_timm_opens_in_transformers_too(autoencoder, tmp_path, monkeypatch):
    model, _ = autoencoder
    crate_mae.export(model, out=tmp_path / "x", format="timm")
    monkeypatch.chdir(tmp_path / "x")
    code = (tmp_path / "x" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code, names := {"images": IMAGES})
    expected = model.encoder.forward_features(IMAGES)
    torch.testing.assert_close(names["tokens"], expected)
    torch.testing.assert_close(names["model"](IMAGES).last_hidden_state, expected)
    pixels = transformers.AutoImageProcessor.from_pretrained(".")(Image.new("RGB", (20, 20)), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 6, 10)


# In a process in which this library and jaxtyping cannot be imported.
ELSEWHERE = """
import sys, torch

class Blocked:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("crate_mae", "jaxtyping"):
            raise ModuleNotFoundError(f"No module named {name}")

sys.meta_path.insert(0, Blocked)
import transformers
from PIL import Image

full, classifier, expected, saved = sys.argv[1:]
images, tokens, prediction, logits = torch.load(expected)
own = {"trust_remote_code": True}
processor = transformers.AutoImageProcessor.from_pretrained(full, **own)  # before any model has been opened
assert processor(Image.new("RGB", (20, 20)))["pixel_values"].shape == (1, 3, 6, 10)
encoder = transformers.AutoModel.from_pretrained(full, **own)
assert torch.equal(encoder(images).last_hidden_state, tokens)
torch.testing.assert_close(encoder(images, output_attentions=True).last_hidden_state, tokens)
autoencoder = transformers.AutoModelForPreTraining.from_pretrained(full, **own)
assert torch.equal(autoencoder(images, mask_ratio=0.75).logits, prediction)
autoencoder.save_pretrained(saved)
again = transformers.AutoModelForPreTraining.from_pretrained(saved, **own)
assert torch.equal(again(images, mask_ratio=0.75).logits, prediction)
processor = transformers.AutoImageProcessor.from_pretrained(saved, **own)
assert processor(Image.new("RGB", (20, 20)))["pixel_values"].shape == (1, 3, 6, 10)
theirs = transformers.AutoModelForImageClassification.from_pretrained(classifier, **own)
assert torch.equal(theirs(images).logits, logits)
processor = transformers.AutoImageProcessor.from_pretrained(classifier, **own)
assert processor(Image.new("RGB", (20, 20)))["pixel_values"].shape == (1, 3, 6, 10)
print("opened")
"""


@torch.no_grad()
def test_folders_open_where_this_library_is_not_installed(classifier, tmp_path):
    model, folder = crate_mae.create_model(NANO, **SMALL, **SETTINGS["monotone"]).eval(), tmp_path / "full"
    crate_mae.export(model, out=folder, format="hf")
    expected = (
        IMAGES,
        model.encoder.forward_features(IMAGES),
        model(IMAGES, mask_ratio=0.75).prediction,
        classifier[0](IMAGES),
    )
    torch.save(expected, tmp_path / "expected.pt")
    given = [str(x) for x in (folder, classifier[1], tmp_path / "expected.pt", tmp_path / "saved")]
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
    assert done.stdout.endswith("opened\n"), done.stderr[-2000:]
    copied, again = ({file.name for file in place.glob("*.py")} for place in (folder, tmp_path / "saved"))
    assert copied == again


def test_an_encoder_alone_is_evaluated_and_has_no_decoder(autoencoder, tmp_path):
    model, _ = autoencoder
    crate_mae.export(model, out=tmp_path / "x", format="hf", part="encoder", verify=True)
    backbone = open_backbone(str(tmp_path / "x"))
    assert torch.equal(backbone.encoder.forward_features(IMAGES), model.encoder.forward_features(IMAGES))
    with pytest.raises(crate_mae.UserError, match="an encoder alone, in transformers' layout"):
        crate_mae.load(tmp_path / "x")


def test_gradients_reach_every_parameter_with_and_without_checkpointing(autoencoder):
    model, _ = autoencoder
    theirs = pretrained(model, "full").train()
    mask = random_mask(2, 15, 0.5, torch.Generator().manual_seed(3))
    gradients = []
    for enable in (False, True):
        if enable:
            getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)()
        theirs.zero_grad()
        theirs(IMAGES, bool_masked_pos=mask).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in theirs.parameters()])
    assert theirs.encoder.grad_checkpointing and theirs.decoder.grad_checkpointing
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 9}, "format version 9.*knows versions up to 1"),
        ({"format_version": 0}, "format version 0.*knows versions up to 1"),
        ({"format_version": True}, "format version True.*knows versions up to 1"),
        ({"treshold": 0.3}, 'no setting "treshold". Did you mean "threshold"'),
        ({"patch_size": 4}, "do not divide images"),
    ],
)
def test_descriptions_that_do_not_fit_are_told(classifier, tmp_path, change, words):
    values = json.loads((classifier[1] / "config.json").read_text(encoding="utf-8"))
    values["settings"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(load_file(classifier[1] / "model.safetensors"), tmp_path / "model.safetensors")
    for load in (transformers.AutoConfig.from_pretrained, crate_mae.load):
        with pytest.raises(crate_mae.UserError, match=f"(?s){words}"):
            load(tmp_path)


def test_a_configuration_without_arguments_is_the_base_model():
    assert CrateMAEConfig().hidden_size == 768
    assert autoencoder_config(CrateMAEConfig()) == preset("crate_mae_base_patch16_224")


def test_transformers_knows_our_models_after_one_import():
    orders = ("import crate_mae.hf, transformers", "import transformers; transformers.AutoModel; import crate_mae")
    check = "config = transformers.AutoConfig.for_model('crate_mae'); assert type(config).__name__ == 'CrateMAEConfig'"
    mapped = "assert type(config) in transformers.MODEL_FOR_PRETRAINING_MAPPING"
    assert failing([f"{imports}; {check}; {mapped}" for imports in orders], warnings="ignore") == ""
