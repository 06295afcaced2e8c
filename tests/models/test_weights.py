"""Models on disk: nothing lost, nothing half-written, and plain words for what is not a model."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.models import weights
from crate_mae.models.presets import bundled_folder, list_bundled
from crate_mae.models.timm_models import write_encoder

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    model = crate_mae.create_model("crate_mae_nano_patch2_8", **SMALL, norm_pix_loss=True, image_size=(6, 10))
    crate_mae.save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "vit_mae_nano_matched_patch2_8"])
def test_a_saved_model_is_the_same_when_loaded(tmp_path, name):
    model = crate_mae.create_model(name, mask_tokens="decoder", in_chans=2, mean=[0.1, 0.2], std=[0.3, 0.4]).eval()
    crate_mae.save(model, tmp_path)
    again = crate_mae.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert again.config == model.config
    assert not again.training
    images = torch.randn(3, 2, 8, 8)
    assert torch.equal(again(images).prediction, model(images).prediction)


KEPT = sorted(config.parent for config in (Path(__file__).parents[2] / "trained_models").glob("*/config.json"))


def test_what_the_package_holds_is_small():
    assert list_bundled()
    assert sum((bundled_folder(name) / "model.safetensors").stat().st_size for name in list_bundled()) < 6e6


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_the_index_of_trained_models_has_their_checksums(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest}`" in (folder.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", [*map(bundled_folder, list_bundled()), *KEPT], ids=lambda folder: folder.name)
def test_a_trained_model_is_small_and_has_a_card(folder):
    assert (folder / "model.safetensors").stat().st_size < 6e6
    assert folder.name in (folder / "README.md").read_text(encoding="utf-8")
    assert "Loss of normalised hidden patches" in (folder / "training.md").read_text(encoding="utf-8")
    model = crate_mae.load(folder)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert (model.encoder.norm.weight - 1).abs().max() > 0.05  # all are 1 before training


def test_a_name_loads_a_fresh_model():
    assert crate_mae.load("crate_mae_nano_patch2_8", threshold=0.2).config.threshold == 0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(crate_mae.UserError, match=r"not finite, in 1 tensor\(s\) such as decoder\.norm\.weight"):
        crate_mae.load(folder)


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("crate_mae_nano_patch2_8", "encoder.blocks.1.ista", "step_size"),
        ("crate_mae_nano_monotone_patch2_8", "encoder.blocks.0.ista", "threshold"),
        ("crate_mae_nano_compressing_patch2_8", "encoder.blocks.0", "ista_skip"),
        ("crate_mae_nano_patch2_8", "decoder.blocks.0.attn", "num_heads"),
        ("vit_mae_nano_patch2_8", "encoder.blocks.0.attn", "scale"),
        ("vit_mae_nano_patch2_8", "decoder.norm", "eps"),
    ],
)
def test_a_layer_that_computes_with_another_number_than_its_config_says_is_not_written(tmp_path, name, part, key):
    model = crate_mae.create_model(name)
    setattr(model.get_submodule(part), key, 2)
    writers = [crate_mae.save, write_encoder, lambda model, _folder: crate_mae.to_official(model)]
    for write in writers:
        with pytest.raises(crate_mae.UserError, match=rf"{part}\.{key} of this model is 2, but its config describes"):
            write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_can_be_changed_on_loading_if_the_tensors_still_fit(folder):
    assert crate_mae.load(folder, norm_pix_loss=False).config.norm_pix_loss is False
    with pytest.raises(crate_mae.UserError, match="weights of another model"):
        crate_mae.load(folder, depth=3)


def test_a_failed_save_leaves_the_old_model_whole(folder, monkeypatch):
    before = load_file(folder / "model.safetensors")

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        crate_mae.save(crate_mae.create_model("crate_mae_nano_patch2_8"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    crate_mae.load(folder)


def test_cut_short_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(crate_mae.UserError, match="cut short"):
        crate_mae.load(folder)


def test_weights_of_another_model_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.pred.bias"] = torch.zeros(5)
    del tensors["mask_token"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(crate_mae.UserError) as caught:
        crate_mae.load(folder)
    assert "mask_token is missing" in str(caught.value)
    assert "decoder.pred.bias is (5,), not (12,)" in str(caught.value)


def test_weights_of_an_encoder_alone_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith("encoder.")}, folder / "model.safetensors")
    with pytest.raises(crate_mae.UserError, match=r"weights of another model .*\n.*decoder"):
        crate_mae.load(folder)


def test_a_pickle_is_not_opened_as_a_model(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(crate_mae.create_model("crate_mae_nano_patch2_8"), path)
    with pytest.raises(crate_mae.UserError, match="is a file, but a model is a folder"):
        crate_mae.load(path)
    with pytest.raises(crate_mae.UserError, match="could run code"):
        crate_mae.from_official(path, num_heads=4)


def test_a_pickle_with_the_name_of_weights_is_not_opened(folder):
    torch.save({"mask_token": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(crate_mae.UserError, match="cannot be read as safetensors"):
        crate_mae.load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "does not describe a crate-mae model"),
        ('{"model_type": "vit_mae"}', "does not describe a crate-mae model"),
        ('{"library": "crate-mae", "architecture": "mlp"}', 'Unknown architecture "mlp"'),
    ],
)
def test_a_foreign_or_damaged_config_is_named(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(crate_mae.UserError, match=words):
        crate_mae.load(folder)


def test_unknown_keys_in_a_config_are_named(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": 3}))
    with pytest.raises(crate_mae.UserError, match='no setting "width"'):
        crate_mae.load(folder)


@pytest.mark.parametrize("name", ["nowhere", "crate_mae_giant"])
def test_what_is_no_model_is_told_with_the_forms_of_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(crate_mae.UserError, match="A model is a run folder"):
        crate_mae.load(name)
    (tmp_path / name).mkdir()
    with pytest.raises(crate_mae.UserError, match=r"has no model\.safetensors and no config\.json"):
        crate_mae.load(name)


def test_the_hub_is_named_when_it_cannot_be_reached(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(crate_mae.UserError, match="cannot be reached"):
        crate_mae.load("hf:somebody/crate")


def test_a_hub_repository_is_a_folder_with_the_same_files(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(folder))
    assert crate_mae.load("hf:somebody/crate").config == crate_mae.load(folder).config


def test_an_unfinished_run_is_the_model_of_its_newest_checkpoint(folder):
    run = folder.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    folder.rename(run / "checkpoints" / "step-7")
    (run / "checkpoints" / "last").write_text("step-7\n")
    assert crate_mae.load(run).config.depth == 2


def test_traces_collect_by_name_and_leave_no_hook(folder):
    model = crate_mae.load(folder)
    with crate_mae.trace(model, ["encoder.blocks.*.ista", "decoder.norm"]) as record:
        model(torch.randn(3, 3, 6, 10))
        model(torch.randn(2, 3, 6, 10))
    assert list(record) == ["encoder.blocks.0.ista", "encoder.blocks.1.ista", "decoder.norm"]
    assert [len(x) for x in record["decoder.norm"]] == [3, 2]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(crate_mae.UserError, match='is called "encoder'), crate_mae.trace(model, ["encoder.layers.*"]):
        pass
