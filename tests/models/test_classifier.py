"""The classifier: what it computes, what it is built from, and its layers for the optimizer."""

import dataclasses

import pytest
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay

import crate_mae
from crate_mae.data import evaluation_transform
from crate_mae.errors import UserError
from crate_mae.models.classifier import Classifier, build_classifier
from crate_mae.models.config import ClassifierConfig
from crate_mae.models.weights import load_autoencoder, load_classifier, read_config

NAMES = ("ant", "bee", "cat")


def encoder_config(name="crate_mae_nano_patch2_8", **settings):
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1, "image_size": (6, 10)}
    return crate_mae.create_model(name, **{**small, **settings}).config


@pytest.fixture
def config():
    return ClassifierConfig(encoder=encoder_config(), classes=NAMES)


@pytest.fixture
def model(config):
    torch.manual_seed(1)
    model = build_classifier(config).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


IMAGES = torch.randn(5, 3, 6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("pooling", "width"), [("cls", 24), ("mean", 24), ("cls+mean", 48)])
def test_logits_are_those_of_the_definition(pooling, width):
    torch.manual_seed(1)
    model = build_classifier(ClassifierConfig(encoder=encoder_config(), classes=NAMES, pooling=pooling)).eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = model.encoder.forward_features(IMAGES)
    parts = {"cls": [tokens[:, 0]], "mean": [tokens[:, 1:].mean(1)], "cls+mean": [tokens[:, 0], tokens[:, 1:].mean(1)]}
    z = torch.cat(parts[pooling], dim=1)
    if pooling != "cls":
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    assert z.shape == (5, width)
    torch.testing.assert_close(model(IMAGES), z @ model.head.weight.T + model.head.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_every_parameter_gets_a_gradient(name, pooling):
    config = ClassifierConfig(encoder=encoder_config(name), classes=NAMES, pooling=pooling)
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0, 1])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_fresh_head_finds_all_classes_equally_likely(config):
    probabilities = build_classifier(config).eval()(IMAGES).softmax(dim=1)
    assert torch.allclose(probabilities, torch.full((5, 3), 1 / 3), atol=1e-3)


def test_a_saved_classifier_is_the_same_when_loaded(model, tmp_path):
    crate_mae.save(model, tmp_path)
    again = crate_mae.load(tmp_path)
    assert isinstance(again, Classifier) and not again.training
    assert again.config == model.config
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert crate_mae.load(tmp_path, drop_path=0.3).config.encoder.drop_path == 0.3


def test_a_configuration_has_what_preparing_images_needs(config):
    for key in ("name", "image_size", "in_chans", "mean", "std"):
        assert getattr(config, key) == getattr(config.encoder, key)


def test_another_image_size_is_kept_on_disk(model, tmp_path):
    model.encoder.set_input_size(img_size=(8, 12))
    resized = Classifier(model.encoder, model.config.replace(image_size=(8, 12)))
    crate_mae.save(resized, tmp_path)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(crate_mae.load(tmp_path)(images), resized.eval()(images))


def test_a_classifier_and_an_autoencoder_are_not_taken_for_each_other(model, tmp_path):
    crate_mae.save(model, tmp_path)
    with pytest.raises(crate_mae.UserError, match="is a classifier and has no decoder"):
        load_autoencoder(tmp_path)
    with pytest.raises(crate_mae.UserError, match="is an autoencoder and has no classes"):
        load_classifier("crate_mae_nano_patch2_8")
    assert load_autoencoder("crate_mae_nano_patch2_8").decoder is not None
    assert load_classifier(tmp_path).config.classes == NAMES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("ant",)}, "two or more distinct classes"),
        ({"classes": ("ant", "ant")}, "two or more distinct classes"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, changes, words):
    with pytest.raises(crate_mae.UserError, match=words):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize("damage", [{"classes": "ant"}, {"classes": [1, 2]}, {"encoder": 3}, {"width": 2}])
def test_a_damaged_description_is_one_sentence(model, tmp_path, damage):
    import json

    crate_mae.save(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(crate_mae.UserError, match="A classifier is described by"):
        read_config(tmp_path)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(crate_mae.UserError, match="Images are 3 x 6 x 6, but this model takes 3 x 6 x 10"):
        model(torch.zeros(2, 3, 6, 6))


def test_layers_learn_slower_the_earlier_they_are(model):
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    expected = {"cls_token": 0.125, "patch_embed.proj.weight": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "norm": 0.5}
    for name, parameter in model.named_parameters():
        stem = name.removeprefix("encoder.")
        scales = [scale for start, scale in expected.items() if name != stem and stem.startswith(start)]
        if name.startswith(("head", "norm")):
            scales = [1.0]
        if scales:
            assert of[id(parameter)]["lr_scale"] == scales[0], name
        is_spared = parameter.ndim <= 1 or name == "encoder.cls_token"
        assert of[id(parameter)]["weight_decay"] == (0.0 if is_spared else 0.05), name


def test_images_are_classified_from_python(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 7, 9, generator=generator), torch.rand(3, 12, 10, generator=generator)]
    path = tmp_path / "a.png"
    Image.fromarray((pictures[1].permute(1, 2, 0) * 255).byte().numpy()).save(path)
    c = model.config
    prepare = evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)
    expected = model(torch.stack([prepare(pictures[0]), prepare(Image.open(path))])).softmax(1)
    model.train()
    found = model.predict([pictures[0], path], batch_size=1)
    assert model.training
    torch.testing.assert_close(found.probabilities, expected)
    assert found.classes == [NAMES[i] for i in expected.argmax(1)]
    assert model.predict(path).classes == found.classes[1:]
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png cannot be read: the file is empty"):
        model.predict([path, tmp_path / "b.png"])
