"""Folders of models from others: what does not fit is told before a model is built, and nothing is unpacked or run."""

import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.models.official import understand
from crate_mae.models.timm_models import write_encoder

SMALL = {"in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1}
HUGE = {
    "depth": [10**6, 999, 3],
    "decoder_depth": [10**6, 999],
    "in_chans": [10**8, 2],
    "embed_dim": [2**22, 2**16, 48],
    "decoder_embed_dim": [2**22, 512],
    "image_size": [[2**20, 2**20], [512, 512], [16, 8]],
    "patch_size": [10**9, 4],
    "overcomplete": [10**7, 64],
    "num_heads": [10**30, 5],
    "step_size": [float("inf"), 0],
    "threshold": [float("nan"), 10**30],
    "ista_steps": [10**6, 2, -1],
    "drop_path": [float("nan"), 1.0],
    "mean": [[10**30], [float("nan")], [0.1] * 5],
    "std": [[0.0], [float("inf")]],
    "layer": ["monotone", "x" * 10**6],
    "name": ["x" * 10**6, 7],
    "architecture": ["mlp", ["crate"], None],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = crate_mae.create_model("crate_mae_nano_patch2_8", **SMALL)
    crate_mae.save(model, folder / "ours")
    (folder / "timm").mkdir()
    write_encoder(model, folder / "timm")
    torch.save(crate_mae.to_official(model), folder / "official.pth")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / "ours" / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in HUGE.items() for value in values])
def test_a_configuration_of_another_model_is_refused_before_it_is_built(key, value, folder, monkeypatch):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: value}))
    monkeypatch.setattr("crate_mae.models.weights.initialised", pytest.fail)
    with pytest.raises(crate_mae.UserError):
        crate_mae.load(folder)


@pytest.mark.parametrize(
    "arguments", [{"depth": 999}, {"embed_dim": 2**16}, {"img_size": [512, 512]}, {"depth": 10**6}]
)
@pytest.mark.parametrize("name", ["crate_mae_custom", "vit_tiny_patch16_224"])
def test_a_folder_of_timm_is_compared_too(name, arguments, saved, tmp_path):
    values = json.loads((saved / "timm" / "config.json").read_text())
    values |= {"architecture": name, "model_args": (values["model_args"] if "crate" in name else {}) | arguments}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((saved / "timm" / "model.safetensors").read_bytes())
    with pytest.raises(crate_mae.UserError):
        open_backbone(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64])
def test_weights_of_other_types_are_refused(dtype, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(crate_mae.UserError, match="must be float32, float64, float16 or bfloat16"):
        crate_mae.load(folder)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63])
def test_headers_that_are_not_what_they_say_are_refused(length, folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(crate_mae.UserError, match="cannot be read as safetensors"):
        crate_mae.load(folder)


def write_text(path, _):
    path.write_text("root:x:0:0\n")


def write_compressed(path, official):
    with zipfile.ZipFile(official) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for item in whole.infolist():
            packed.writestr(item.filename, whole.read(item))


def changed(name, value):
    return lambda path, official: torch.save({**torch.load(official), name: value}, path)


FILES = {
    "text": write_text,
    "nothing": lambda path, _: path.write_bytes(b""),
    "numbers as names": lambda path, _: torch.save({1: torch.zeros(1)}, path),
    "no names": lambda path, _: torch.save({}, path),
    "a list": lambda path, _: torch.save([torch.zeros(1)], path),
    "compressed": write_compressed,
    "few bytes that claim many": changed("patch_embed.proj.weight", torch.zeros(1).expand(2**20, 1, 2**10, 2**10)),
    "sparse": changed("mask_token", torch.zeros(1, 1, 24).to_sparse()),
    "no memory": changed("mask_token", torch.zeros(1, 1, 24, device="meta")),
    "integers": changed("mask_token", torch.zeros(1, 1, 24, dtype=torch.int32)),
    "not finite": changed("mask_token", torch.full((1, 1, 24), torch.nan)),
    "no dimensions": changed("patch_embed.proj.weight", torch.zeros(())),
    "another width": changed("decoder_pos_embed", torch.zeros(1, 17, 4)),
    "a vector": changed("blocks.0.layers.0.0.fn.qkv.weight", torch.zeros(24)),
}


@pytest.mark.parametrize("kind", FILES)
def test_odd_files_are_not_converted(kind, saved, tmp_path):
    FILES[kind](tmp_path / "file.pth", saved / "official.pth")
    with pytest.raises(crate_mae.UserError):
        understand(tmp_path / "file.pth", 3)


def test_what_would_be_ignored_is_refused(saved):
    with pytest.raises(crate_mae.UserError, match="leave --num-heads out"):
        understand(saved / "ours", 7)
    with pytest.raises(crate_mae.UserError, match="threshold is nan"):
        understand(saved / "official.pth", 3, threshold=float("nan"))
    assert understand(saved / "official.pth", 3).found.startswith("an official CRATE-MAE")
