"""Published weights as folders of this library."""

import argparse
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.models.official import PUBLISHED_HEADS
from crate_mae.models.presets import preset

NANO = "crate_mae_nano_patch2_8"
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def official():
    """An official state dict, and the model that it belongs to."""
    torch.manual_seed(1)
    model = crate_mae.create_model(NANO, embed_dim=24, num_heads=3, depth=2, decoder_depth=1).eval()
    return model, crate_mae.to_official(model)


def classifier_state(width=20, depth=2, patch=2, side=4, classes=7):
    """A state dict of the official classifier's names and shapes."""
    pixels = 3 * patch * patch
    shapes = {
        "pos_embedding": (1, 1 + side * side, width),
        "cls_token": (1, 1, width),
        "to_patch_embedding.1.weight": (pixels,),
        "to_patch_embedding.1.bias": (pixels,),
        "to_patch_embedding.2.weight": (width, pixels),
        "to_patch_embedding.2.bias": (width,),
        "to_patch_embedding.3.weight": (width,),
        "to_patch_embedding.3.bias": (width,),
        "mlp_head.0.weight": (width,),
        "mlp_head.0.bias": (width,),
        "mlp_head.1.weight": (classes, width),
        "mlp_head.1.bias": (classes,),
    }
    for i in range(depth):
        for part in (0, 1):
            shapes |= {f"transformer.layers.{i}.{part}.norm.{name}": (width,) for name in ("weight", "bias")}
        shapes |= {
            f"transformer.layers.{i}.0.fn.qkv.weight": (width, width),
            f"transformer.layers.{i}.0.fn.to_out.0.weight": (width, width),
            f"transformer.layers.{i}.0.fn.to_out.0.bias": (width,),
            f"transformer.layers.{i}.1.fn.weight": (width, width),
        }
    generator = torch.Generator().manual_seed(2)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def classifier_features(state, images, heads, threshold=0.1, step=0.1):
    """The official classifier's tokens before its last linear map, from the equations."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    x = F.linear(norm(x, "to_patch_embedding.1"), *(state[f"to_patch_embedding.2.{n}"] for n in ("weight", "bias")))
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), norm(x, "to_patch_embedding.3")], dim=1)
    x = x + state["pos_embedding"]
    for i in range(2):
        name = f"transformer.layers.{i}"
        w = F.linear(norm(x, f"{name}.0.norm"), state[f"{name}.0.fn.qkv.weight"])
        w = w.unflatten(-1, (heads, -1)).transpose(1, 2)
        heads_out = (torch.softmax(w @ w.mT * w.shape[-1] ** -0.5, dim=-1) @ w).transpose(1, 2).flatten(2)
        out = f"{name}.0.fn.to_out.0"
        x = norm(x + F.linear(heads_out, state[f"{out}.weight"], state[f"{out}.bias"]), f"{name}.1.norm")
        d = state[f"{name}.1.fn.weight"]
        x = torch.relu(x + step * (x @ d - x @ d.T @ d) - step * threshold)
    return norm(x, "mlp_head.0")


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_an_official_file_with_and_without_what_training_wraps_it_in(official, tmp_path, crate_mae_command, prefix):
    model, state = official
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    options = argparse.Namespace(lr=3e-5)
    torch.save({"model": wrapped, "epoch": 799, "args": options} if prefix else wrapped, tmp_path / "base.pth")
    code, out, err = crate_mae_command(
        "convert", tmp_path / "base.pth", "--out", tmp_path / "x", "--num-heads", 3, "--norm-pix-loss"
    )
    assert code == 0, err
    assert "Found an official CRATE-MAE: width 24, 2 + 1 layers, patches of 2, images of 8 x 8." in out
    assert ("prefix " + prefix in out) == bool(prefix)
    assert "decoder_embed, 600 numbers of a layer that the official code never calls" in out
    assert "pos_embed, 408 numbers of a table that the official code never reads" in out
    converted = crate_mae.load(tmp_path / "x")
    assert converted.config.name == "base" and converted.config.norm_pix_loss
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    assert torch.equal(converted(IMAGES, mask=mask).prediction, model(IMAGES, mask=mask).prediction)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_published_shapes_are_recognised(size):
    """Shapes alone: nothing is computed, and no memory taken."""
    config = preset(f"crate_mae_{size}_patch16_224")
    with torch.device("meta"):
        state = crate_mae.to_official(crate_mae.models.build(config))
        published = {"tiny": 11.56, "small": 25.41, "base": 44.64, "large": 154.27}[size]
        assert abs(sum(value.numel() for value in state.values()) / 1e6 - published) < 0.3
        heads = PUBLISHED_HEADS[config.embed_dim]
        assert crate_mae.from_official(state, num_heads=heads, name=config.name).config == config


@torch.no_grad()
def test_an_official_classifier_becomes_an_encoder(tmp_path, crate_mae_command):
    state = classifier_state()
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "crate.safetensors")
    command = ("convert", tmp_path / "crate.safetensors", "--num-heads", 5)
    code, out, err = crate_mae_command(*command, "--out", tmp_path / "x")
    assert code == 0, err
    assert "Found an official CRATE classifier: width 20, 2 layers, patches of 2, images of 8 x 8." in out
    assert "mlp_head.1, the map to 7 classes" in out and "threshold 0.1" in out
    encoder = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    expected = classifier_features(state, IMAGES, heads=5)
    torch.testing.assert_close(encoder.forward_features(IMAGES), expected, rtol=1e-4, atol=1e-5)
    backbone = open_backbone(str(tmp_path / "x"))
    torch.testing.assert_close(backbone.encoder.forward_features(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert crate_mae_command(*command, "--out", tmp_path / "y", "--threshold", 0.5)[0] == 0
    other = timm.create_model(f"local-dir:{tmp_path / 'y'}", pretrained=True).eval()
    expected = classifier_features(state, IMAGES, heads=5, threshold=0.5)
    torch.testing.assert_close(other.forward_features(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_our_own_folders_and_those_of_transformers(official, tmp_path):
    model, _ = official
    crate_mae.save(model, tmp_path / "ours")
    converted = crate_mae.convert(tmp_path / "ours", out=tmp_path / "x")
    assert "MaskedAutoencoder of this library" in converted.found and converted.notes == []
    pytest.importorskip("transformers")
    crate_mae.export(tmp_path / "x", out=tmp_path / "hf", format="hf")
    crate_mae.convert(tmp_path / "hf", out=tmp_path / "y")
    for name, value in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "y" / "model.safetensors")[name], value), name
    assert crate_mae.load(tmp_path / "y").config == model.config


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: _without(s, "blocks.1.layers.0.1.fn.weight"), "blocks.1.layers.0.1.fn.weight is missing"),
        (lambda s: s | {"norm.weight": torch.zeros(25)}, "norm.weight is (25,), not (24,)"),
        (lambda s: s | {"gate": torch.zeros(1)}, "gate is unknown"),
        (lambda s: {"a.weight": torch.zeros(2)}, "Its first tensors are a.weight"),
        (lambda s: {"encoder.norm.weight": torch.zeros(2)}, "config.json is missing: name the folder"),
        (lambda s: classifier_state() | {"gate": torch.zeros(1)}, "gate is unknown"),
        (lambda s: _without(classifier_state(), "mlp_head.0.bias"), "norm.bias is missing"),
        (lambda s: classifier_state() | {"pos_embedding": torch.zeros(1, 16, 20)}, "do not make a square image"),
    ],
)
def test_files_that_do_not_fit_are_told_and_nothing_is_made(official, tmp_path, crate_mae_command, change, words):
    save_file(change(official[1]), tmp_path / "file.safetensors")
    command = ("convert", tmp_path / "file.safetensors", "--out", tmp_path / "x", "--num-heads", 4)
    code, _, err = crate_mae_command(*command)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_heads_that_nobody_knows_are_asked_for(official, tmp_path, crate_mae_command):
    save_file(official[1], tmp_path / "file.safetensors")
    code, _, err = crate_mae_command("convert", tmp_path / "file.safetensors", "--out", tmp_path / "x")
    assert code == 2 and "--num-heads" in err


def test_damaged_and_dangerous_files(tmp_path, crate_mae_command):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    torch.save({"model": Dangerous()}, tmp_path / "code.pth")
    for name, words in (
        ("cut.safetensors", "cannot be read as safetensors"),
        ("code.pth", "could run code"),
        ("none.pth", "does not exist"),
    ):
        code, _, err = crate_mae_command("convert", tmp_path / name, "--out", tmp_path / "x")
        assert code == 2 and words in err, err
    assert not (tmp_path / "x").exists() and not Dangerous.ran


class Dangerous:
    ran = False

    def __reduce__(self):
        return (setattr, (Dangerous, "ran", True))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format_version": 9}, "knows versions up to 1"), ({"treshold": 1.0}, 'Did you mean "threshold"?')],
)
def test_descriptions_of_a_newer_version_or_with_unknown_keys(official, tmp_path, crate_mae_command, change, words):
    crate_mae.save(official[0], tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    for command in ("convert", "export"):
        code, _, err = crate_mae_command(command, tmp_path / "ours", "--out", tmp_path / "x")
        assert code == 2 and words in err and str(path) in err
        assert not (tmp_path / "x").exists()


def test_a_folder_that_is_there_is_left_alone(official, tmp_path, crate_mae_command):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    save_file(official[1], tmp_path / "file.safetensors")
    code, _, err = crate_mae_command("convert", tmp_path / "file.safetensors", "--out", tmp_path / "x")
    assert code == 2 and "exists already" in err
