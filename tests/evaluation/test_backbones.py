"""Every form of MODEL that can be evaluated."""

import dataclasses

import huggingface_hub
import pytest
import timm
import torch

import crate_mae
from crate_mae.errors import UserError
from crate_mae.evaluation import backbones
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.models.timm_models import write_encoder

MODEL = "crate_mae_nano_patch2_8"


def same_weights(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_saved_model_brings_its_own_preparation(tmp_path):
    model = crate_mae.create_model(MODEL, image_size=(6, 10), in_chans=1, mean=(0.3,), std=(0.2,))
    crate_mae.save(model, tmp_path / "model")
    backbone = open_backbone(tmp_path / "model")
    assert (backbone.image_size, backbone.in_chans, backbone.mean, backbone.std) == ((6, 10), 1, (0.3,), (0.2,))
    assert same_weights(backbone.encoder, model.encoder)
    assert not backbone.is_random
    assert not backbone.encoder.training
    assert same_weights(open_backbone(model.train()).encoder, model.encoder)
    assert model.encoder.training


def test_a_classifier_is_its_encoder(tmp_path):
    from crate_mae.models.classifier import build_classifier
    from crate_mae.models.config import ClassifierConfig
    from crate_mae.models.presets import preset

    classifier = build_classifier(ClassifierConfig(encoder=preset(MODEL), classes=("cat", "dog"), pooling="cls"))
    crate_mae.save(classifier, tmp_path / "model")
    backbone = open_backbone(tmp_path / "model")
    assert same_weights(backbone.encoder, classifier.encoder)
    assert backbone.image_size == (8, 8)


def test_a_name_has_a_random_initialisation_by_the_seed_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    one, same, other = (open_backbone(MODEL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.is_random
    assert same_weights(one.encoder, same.encoder)
    assert not same_weights(one.encoder, other.encoder)


def test_a_timm_network_has_its_published_preparation():
    backbone = open_backbone("timm:test_vit:untrained", seed=3)
    assert backbone.image_size == (160, 160)
    assert backbone.mean == (0.5, 0.5, 0.5)
    assert backbone.is_random
    assert backbone.encoder.num_classes == 0
    assert same_weights(backbone.encoder, open_backbone("timm:test_vit:untrained", seed=3).encoder)
    plain = open_backbone("timm:test_resnet:untrained")
    assert plain.mean == timm.create_model("test_resnet").pretrained_cfg["mean"]


def test_a_timm_network_from_python_keeps_its_size_and_channels():
    backbone = open_backbone(timm.create_model("test_vit", img_size=32, in_chans=1))
    assert (backbone.image_size, backbone.in_chans) == ((32, 32), 1)
    assert backbone.mean == pytest.approx((0.5,))
    assert backbone.fingerprint() is None


def unreachable(*_arguments, **_options):
    raise OSError("Temporary failure in name resolution\nwith a second line")


def test_published_weights_without_a_network_are_a_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("the hub's library would retry"))
    with pytest.raises(UserError) as error:
        open_backbone("timm:test_vit")
    assert "weights of timm:test_vit cannot be loaded: Temporary failure in name resolution\n" in str(error.value)
    assert "timm:NAME:untrained" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_published_weights_on_this_machine_need_no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda repository, file: f"/kept/{file}")
    plain = timm.create_model("test_vit", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: plain)
    backbone = open_backbone("timm:test_vit")
    assert backbone.encoder is plain
    assert not backbone.is_random


def test_a_timm_network_without_published_weights_is_a_sentence():
    with pytest.raises(UserError, match="weights of timm:convnext_atto_rms cannot be loaded: "):
        open_backbone("timm:convnext_atto_rms")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("timm:vit_tinny_patch16_224", "Did you mean timm:vit_tiny_patch16_224"),
        ("timm:test_vit:trained", "must look like timm:NAME or timm:NAME:untrained"),
        ("pixels:big", "must look like pixels or pixels:SIZE"),
        ("pixels:0", "must look like pixels or pixels:SIZE"),
        ("nowhere", "A model is a run folder"),
        (torch.nn.Linear(2, 3), "A Linear has no forward_features"),
    ],
)
def test_an_invalid_model_is_named(model, words):
    with pytest.raises(UserError, match=words):
        open_backbone(model)


def test_pixels_are_the_pixels():
    backbone = open_backbone("pixels:2")
    images = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert backbone.encoder.forward_features(images)[:, 0].tolist() == images.flatten(1).tolist()
    assert open_backbone("pixels").image_size == (32, 32)


def test_a_fingerprint_changes_with_all_that_decides_features():
    model = crate_mae.create_model(MODEL)
    backbone = open_backbone(model)
    prints = {backbone.fingerprint()}
    assert prints == {open_backbone(model).fingerprint()}
    for change in ({"image_size": (10, 8)}, {"mean": (0.1, 0.2, 0.3)}, {"std": (0.1, 0.2, 0.3)}):
        prints.add(dataclasses.replace(backbone, **change).fingerprint())
    # The same weights with another threshold are another function.
    other = crate_mae.create_model(MODEL, threshold=0.2)
    other.load_state_dict(model.state_dict())
    prints.add(open_backbone(other).fingerprint())
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[0] += 1e-6
    prints.add(backbone.fingerprint())
    assert len(prints) == 6


def test_any_form_of_model_has_an_untrained_one(tmp_path):
    net = crate_mae.create_model("crate_mae_nano_patch2_8")
    crate_mae.save(net, tmp_path / "whole")
    (tmp_path / "timm").mkdir()
    write_encoder(net, tmp_path / "timm")
    for name in (f"{tmp_path / 'whole'}", f"{tmp_path / 'timm'}"):
        trained, first, again, other = (
            open_backbone(f"{name}{suffix}", seed=seed)
            for suffix, seed in (("", 0), (":untrained", 1), (":untrained", 1), (":untrained", 2))
        )
        assert (trained.is_random, first.is_random, first.name) == (False, True, f"{name}:untrained")
        assert same_weights(trained.encoder, net.encoder)
        assert same_weights(first.encoder, again.encoder)
        assert not same_weights(first.encoder, trained.encoder)
        assert not same_weights(first.encoder, other.encoder)
    assert not crate_mae.load(f"{tmp_path / 'whole'}:untrained").training


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("crate_mae_nano_patch2_8:untrained", "names a model without trained weights: leave :untrained out"),
        ("pixels:untrained", "raw pixels have no weights: leave :untrained out"),
        ("missing:untrained", "missing does not exist and is not the name of a model"),
    ],
)
def test_what_cannot_be_untrained_is_refused(model, words):
    with pytest.raises(UserError, match=words):
        open_backbone(model)
