"""Our encoders by their names in timm, and what timm promises of them; `timm_suite.py` runs timm's own tests too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm_suite
import torch
from timm.layers import set_fused_attn
from timm.optim import param_groups_layer_decay
from timm.utils import AttentionExtract

import crate_mae
from crate_mae.models.presets import list_bundled, preset
from crate_mae.models.timm_models import default_cfgs, timm_name
from tests.new_processes import failing

NANO = "crate_mae_nano_patch2_8"
MONOTONE = "crate_mae_nano_monotone_patch2_8"
TRAINED = "crate_mae_micro_monotone_cifar10"
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder():
    torch.manual_seed(2)
    return timm.create_model(NANO, depth=3).eval()


@pytest.fixture
def visible_attention():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def in_a_new_process(program, warnings="error"):
    """Where no shapes are checked at run time, too: what these checks add to a program cannot be scripted or traced."""
    return subprocess.run([sys.executable, "-W", warnings, "-c", program], capture_output=True, text=True)


def test_timm_knows_our_names_after_one_import():
    orders = (
        "import crate_mae.timm; import timm",
        "import timm; import crate_mae.timm",
        "import timm; import crate_mae",
    )
    assert failing([f"{imports}; assert timm.is_model('{NANO}')" for imports in orders]) == ""


def test_importing_the_package_changes_nothing_outside_it():
    program = (
        "import sys\n"
        "before = [*sys.meta_path], [*sys.path_hooks]\n"
        "import crate_mae\n"
        "assert before == (sys.meta_path, sys.path_hooks)\n"
        "assert not {'timm', 'torch', 'transformers', 'logging', 'crate_mae.models'} & {*sys.modules}"
    )
    result = in_a_new_process(program)
    assert result.returncode == 0, result.stderr


def test_every_preset_and_trained_model_is_there():
    assert {*crate_mae.list_models(), *list_bundled()} <= set(timm.list_models("*_mae_*"))
    assert timm.list_pretrained("crate_mae_*") == list_bundled()


@pytest.mark.parametrize(
    "name",
    [
        NANO,
        "crate_mae_nano_visible_patch2_8",
        "crate_mae_nano_compressing_patch2_8",
        "crate_mae_nano_monotone_patch2_8",
        "vit_mae_nano_matched_patch2_8",
    ],
)
def test_timm_builds_the_encoder_of_the_preset(name):
    ours = crate_mae.create_model(name).encoder.eval()
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.forward_features(IMAGES), ours.forward_features(IMAGES))


def test_the_trained_model_loads_without_a_network():
    theirs = timm.create_model(TRAINED, pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = crate_mae.load(TRAINED).encoder.forward_features(images)
    assert torch.equal(theirs.forward_features(images), expected)
    assert not torch.equal(timm.create_model(TRAINED).eval().forward_features(images), expected)


def test_a_trained_model_takes_other_sizes_channels_and_classes():
    grey = timm.create_model(TRAINED, pretrained=True, img_size=(24, 48), in_chans=1, num_classes=5).eval()
    assert grey(torch.randn(2, 1, 24, 48)).shape == (2, 5)
    trained = timm.create_model(TRAINED, pretrained=True)
    summed = trained.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, summed)
    trained.set_input_size((24, 48))
    torch.testing.assert_close(grey.pos_embed, trained.pos_embed)


def test_a_model_of_ones_own_loads_by_its_file(tmp_path):
    model = crate_mae.create_model(NANO).eval()
    crate_mae.save(model, tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    theirs = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(theirs.forward_features(IMAGES), model.encoder.forward_features(IMAGES))


def test_arguments_describe_an_encoder_completely():
    unusual = {"threshold": 0.2, "step_size": 0.3, "output_projection": "tied", "ista_skip": True, "overcomplete": 2}
    config = preset(NANO).replace(name="mine", **unusual)
    ours = crate_mae.models.build(config).encoder.eval()
    theirs = timm.create_model(timm_name(config), **config.encoder_arguments()).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.forward_features(IMAGES), ours.forward_features(IMAGES))
    with pytest.raises(TypeError, match="treshold"):
        timm.create_model(NANO, treshold=0.2)


def test_settings_of_layers_make_the_layers_that_they_make_in_our_models():
    for settings in ({"layer": "monotone"}, {"layer": "monotone", "ista_steps": 3}, {"layer": "compressing"}, {}):
        torch.manual_seed(3)
        ours = crate_mae.create_model(NANO, **settings).encoder.eval()
        timms = timm.create_model(NANO, **settings).eval()
        timms.load_state_dict(ours.state_dict())
        assert timms.forward_features(IMAGES).equal(ours.forward_features(IMAGES))
    of_a_file = {key: value for key, value in preset(MONOTONE).encoder_arguments().items() if key != "ista_steps"}
    assert timm.create_model(MONOTONE).blocks[0].ista.steps == 2
    assert timm.create_model(MONOTONE, **of_a_file).blocks[0].ista.steps == 1  # of the time when there was one


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ista_steps": -1}, "ista_steps is -1, but must be at least 1"),
        ({"ista_steps": 10**9}, "ista_steps is 1,000,000,000, but must be a number of at most 100"),
        ({"overcomplete": 2}, "monotone layers have no overcomplete"),
        ({"threshold": -1.0}, "threshold is -1.0, but must not be negative"),
    ],
)
def test_settings_of_layers_are_checked(settings, words):
    with pytest.raises(crate_mae.UserError, match=words):
        timm.create_model(MONOTONE, **settings)


def test_timm_prepares_images_as_we_do():
    data = timm.data.resolve_model_data_config(timm.create_model(TRAINED))
    config = crate_mae.load(TRAINED).config
    assert (data["input_size"][1:], data["mean"], data["std"]) == (config.image_size, config.mean, config.std)
    assert data["crop_pct"] == 1.0


def test_features_only_gives_maps():
    maps = timm.create_model(NANO, features_only=True, out_indices=(0, 2)).eval()(IMAGES)
    assert [m.shape for m in maps] == [(2, 96, 4, 4)] * 2


def test_any_image_size_when_asked(encoder):
    dynamic = timm.create_model(NANO, depth=3, dynamic_img_size=True).eval()
    dynamic.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(dynamic(IMAGES), encoder(IMAGES))
    assert dynamic.forward_features(torch.randn(1, 3, 6, 10)).shape == (1, 1 + 15, 96)


def test_timm_extracts_the_attention_that_we_trace(visible_attention):
    encoder = timm.create_model(NANO).eval()
    with crate_mae.trace(encoder, ["*.attention"]) as record:
        encoder(IMAGES)
    found = AttentionExtract(encoder, method="hook")(IMAGES)
    assert len(found) == len(record) == 4
    for theirs, (ours,) in zip(found.values(), record.values(), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_visible_attention_computes_the_same(encoder, visible_attention):
    visible = timm.create_model(NANO, depth=3).eval()
    visible.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(visible(IMAGES), encoder(IMAGES))


def test_torchscript_and_fx_read_the_layers():
    program = (
        "import timm, torch, crate_mae.timm\n"
        "from timm.utils import AttentionExtract\n"
        f"fused = timm.create_model('{NANO}').eval()\n"
        "timm.layers.set_fused_attn(False)\n"
        f"visible = timm.create_model('{NANO}').eval()\n"
        "visible.load_state_dict(fused.state_dict())\n"
        "images = torch.randn(2, 3, 8, 8)\n"
        "monotone = timm.create_model('crate_mae_nano_monotone_patch2_8').eval()\n"
        "compressing = timm.create_model('crate_mae_nano_compressing_patch2_8').eval()\n"
        "for encoder in (fused, visible, monotone, compressing):\n"
        "    expected = (fused if encoder is visible else encoder)(images)\n"
        "    torch.testing.assert_close(torch.jit.script(encoder)(images), expected, rtol=1e-4, atol=1e-5)\n"
        "by_fx, by_hooks = (AttentionExtract(visible, method=method)(images) for method in ('fx', 'hook'))\n"
        "assert list(by_fx) == [f'blocks.{i}.attn.softmax' for i in range(4)]\n"
        "torch.testing.assert_close(list(by_fx.values()), list(by_hooks.values()))\n"
    )
    result = in_a_new_process(program, warnings="ignore")
    assert result.returncode == 0, result.stderr


def test_gradient_checkpointing_changes_no_gradient(encoder):
    encoder.train()
    gradients = []
    for checkpointing in (False, True):
        encoder.set_grad_checkpointing(checkpointing)
        encoder.zero_grad()
        encoder(IMAGES).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    torch.testing.assert_close(*gradients)


def test_layers_get_learning_rates_of_their_own():
    encoder = timm.create_model(NANO, num_classes=3)
    groups = param_groups_layer_decay(encoder, 0.05, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in encoder.named_parameters()}
    assert scales["patch_embed.proj.weight"] == 0.5**5
    assert [scales[f"blocks.{i}.ista.dictionary"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5**1]
    assert scales["head.weight"] == 1.0


def test_attention_masks_are_refused(encoder):
    with pytest.raises(ValueError, match="takes no mask"):
        encoder.forward_features(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_names_timms_own_tests_would_run_on_are_known():
    """What `timm_suite.py` puts in the place of timm's names."""
    source = "from timm import list_models, x\nFEAT_INTER_FILTERS = [\n]\nNON_STD_FILTERS = [\n]\n"
    exec(timm_suite.with_our_names(source.replace(", x", ""), ["crate_mae_nano*"]), space := {})
    assert space["list_models"]() == timm.list_models("crate_mae_nano*")
    assert NANO in space["list_models"](module=space["FEAT_INTER_FILTERS"])
    assert NANO in space["list_models"](space["NON_STD_FILTERS"])
    assert set(default_cfgs) == set(timm.list_models("*_mae_*"))


@pytest.mark.skipif("CRATE_MAE_TIMM_TESTS" not in os.environ, reason="CRATE_MAE_TIMM_TESTS names no folder of tests")
def test_timms_own_tests_pass():
    result = timm_suite.run(Path(os.environ["CRATE_MAE_TIMM_TESTS"]), [NANO, TRAINED, "vit_mae_nano_patch2_8"])
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.rpartition(" passed")[0].split()[-1]) >= 27, result.stdout
