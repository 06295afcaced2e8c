"""`crate-mae estimate`: counts are those of the model, and all mistakes are named at once."""

import json

import pytest
import torch

import crate_mae
from crate_mae.costs.trial import StepSettings, TrialStep

NANO = "crate_mae_nano_patch2_8"
OPTIONS = {"batch_size": 8, "channels": 1, "image_size": (6, 8), "mask_ratio": 0.5, "precision": "float32"}


@pytest.fixture
def steps_are_not_simulated(monkeypatch):
    """For tests of all that follows from operations and memory of a step, or from the configuration."""
    monkeypatch.setattr("crate_mae.costs.trial.step_flops", lambda *_: (2, 3, 7))
    monkeypatch.setattr("crate_mae.costs.memory._simulated", lambda *_: (10**6, 10**7, 10**8))


@pytest.mark.parametrize("name", [NANO, "vit_mae_nano_patch2_8", "crate_mae_nano_visible_patch2_8"])
def test_parameters_and_operations_are_exact(name):
    found = crate_mae.estimate(model=name, devices=2, **OPTIONS)
    settings = StepSettings(batch_size=4, mask_ratio=0.5, weight_decay=0.0, clip_grad=1.0, precision="float32")
    model = crate_mae.create_model(name, in_chans=1, image_size=(6, 8))
    step = TrialStep(model.config, settings, torch.device("cpu"))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.encoder_parameters == sum(p.numel() for p in model.encoder.parameters())
    assert found.parameters == found.encoder_parameters + found.decoder_parameters
    assert found.fixed == sum(p.numel() for p in model.state_dict().values()) - found.parameters
    assert found.training_flops == step.training_flops() / 4
    encoder, whole = step.forward_flops()
    assert found.encoder_flops == encoder / 4
    assert found.encoder_flops + found.decoder_flops == whole / 4


@pytest.mark.usefixtures("steps_are_not_simulated")
def test_state_and_traffic_are_those_of_the_formulas():
    found = crate_mae.estimate(model=NANO, devices=4, **OPTIONS)
    weights = 4 * found.parameters
    assert found.copies.state_bytes == 4 * weights
    assert found.sharded.state_bytes == weights
    assert found.copies.sync_bytes == 2 * weights * 3 // 4
    assert found.sharded.sync_bytes == 3 * weights * 3 // 4
    alone = crate_mae.estimate(model=NANO, **{**OPTIONS, "batch_size": 2})
    assert alone.copies.sync_bytes == 0
    assert alone.copies.memory_cuda == alone.sharded.memory_cuda
    assert found.copies.memory_cuda == alone.copies.memory_cuda + weights  # gradients, gathered to be sent
    layer = 5 * 96 + 3 * 96**2  # two norms and a bias; U, W, D
    assert found.sharded.memory_cuda == alone.copies.memory_cuda + 2 * 4 * layer - 3 * weights * 3 // 4


@pytest.mark.usefixtures("steps_are_not_simulated")
def test_attention_saves_a_matrix_for_every_image_head_and_layer_unless_it_is_fused():
    tokens, half = 1 + 3 * 4, {**OPTIONS, "precision": "bfloat16"}
    assert crate_mae.estimate(model=NANO, **half).attention_bytes == 8 * (4 + 4) * 4 * tokens**2 * 2
    visible = crate_mae.estimate(model="crate_mae_nano_visible_patch2_8", **half)
    assert visible.attention_bytes == 8 * 4 * 4 * (7**2 + tokens**2) * 2
    vit = "vit_mae_nano_patch2_8"
    assert crate_mae.estimate(model=vit, **half).attention_bytes == visible.attention_bytes
    assert [crate_mae.estimate(model=name, **OPTIONS).attention_bytes for name in (NANO, vit)] == [0, 0]
    for precision in ("bfloat16", "float32"):  # balanced attention keeps P in float32
        found = crate_mae.estimate(model="crate_mae_nano_monotone_patch2_8", **{**OPTIONS, "precision": precision})
        assert found.attention_bytes == 2 * visible.attention_bytes


@pytest.mark.usefixtures("steps_are_not_simulated")
def test_times_follow_from_speed_and_link(crate_mae_command):
    speeds = {"flops_per_s": 1e9, "link_bytes_per_s": 1e6, "images": 100, "epochs": 3}
    found = crate_mae.estimate(model=NANO, devices=2, **OPTIONS, **speeds)
    compute = found.training_flops * 4 / 1e9
    assert found.copies.compute_seconds == pytest.approx(compute)
    assert found.copies.step_seconds == pytest.approx(compute + found.copies.sync_bytes / 1e6)
    assert found.steps_per_epoch == 12
    assert found.run_seconds(found.copies) == pytest.approx(36 * found.copies.step_seconds)


@pytest.mark.usefixtures("steps_are_not_simulated")
def test_without_a_speed_there_are_no_times_and_a_line_explains_why(crate_mae_command):
    code, text, _ = crate_mae_command("estimate", "--model", NANO, "--batch-size", 4, "--devices", 2)
    assert code == 0
    for words in ("needs --flops-per-s", "crate-mae doctor", "DDP", "FSDP", "fixed numbers", "AdamW are float32"):
        assert words in text
    assert "an epoch" not in text
    words = ["--flops-per-s", "1e9", "--link-bytes-per-s", "1e9", "--epochs", 7]
    code, text, _ = crate_mae_command("estimate", "--model", NANO, "--batch-size", 4, "--devices", 2, *words)
    assert code == 0
    assert "an epoch of 320,291 steps" in text and "for 7" in text and "Nothing overlaps" in text


@pytest.mark.usefixtures("steps_are_not_simulated")
def test_json_is_the_same(crate_mae_command):
    code, text, _ = crate_mae_command("estimate", "--model", NANO, "--batch-size", 4, "--json", "--image-size", "8x10")
    assert code == 0
    found = json.loads(text)
    assert found["image_size"] == [8, 10]
    assert found["circumstances"]["batch_size"] == 4
    assert found["copies"]["run_seconds"] is None


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--model", "crate_mae_nono_patch2_8", "--batch-size", 4], ["Did you mean crate_mae_nano_patch2_8?"]),
        (["--model", NANO, "--batch-size", 2, "--devices", 4], ["cannot be divided among 4", "--batch-size 4"]),
        (["--model", NANO, "--batch-size", 6, "--devices", 4], ["cannot be divided among 4", "--batch-size 8"]),
        (["--model", NANO, "--batch-size", 4, "--image-size", 9], ["multiple of 2"]),
        (["--model", NANO, "--batch-size", 4, "--channels", 0], ["in_chans is 0"]),
        (["--model", NANO, "--batch-size", 4, "--images", 3], ["larger than the 3 images"]),
        (["--model", NANO, "--batch-size", 4, "--flops-per-s", 0], ["--flops-per-s is 0"]),
        (["--model", NANO, "--batch-size", 4, "--devices", 2, "--flops-per-s", 1e9], ["needs --link-bytes-per-s"]),
        (
            ["--model", "none", "--batch-size", 0, "--devices", -1, "--epochs", 0, "--mask-ratio", 1],
            ["Unknown model none", "--batch-size is 0", "--devices is -1", "--epochs is 0", "--mask-ratio is 1"],
        ),
    ],
)
def test_mistakes_are_named_at_once(crate_mae_command, tokens, words):
    code, text, error = crate_mae_command("estimate", *tokens)
    assert (code, text) == (2, "")
    for word in words:
        assert word in error
