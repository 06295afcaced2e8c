"""Every mistake is reported before a file is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.commands.train import pretrain, resume
from crate_mae.errors import UserError
from crate_mae.models.presets import preset
from crate_mae.options import GIVEN, Mistakes
from crate_mae.training.options import FinetuneOptions, PretrainOptions
from crate_mae.training.resolve import default_base_lr, default_batch_size, with_length
from tests.training.conftest import TINY_RUN


@pytest.fixture
def refused(tiny_run, tmp_path):
    """`refused(**options)`: the message with which a run is refused; nothing may be left of it."""

    def message(**options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as error:
            tiny_run(**options)
        assert sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    return message


def images(number, size=(8, 8)):
    return [torch.rand(1, *size, generator=torch.Generator().manual_seed(i)) for i in range(number)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": "missing/folder"}, "does not exist"),
        ({"data": images(1), "batch_size": 1}, "has 1 image, but pretraining needs at least 2"),
        ({"data": images(100), "batch_size": 200}, "A batch of 200 is larger than the 95 training images"),
        ({"data": images(100), "batch_size": 200}, "--batch-size 95"),
        ({"batch_size": 128, "accumulation": 3}, "take --batch-size 129"),
        ({"epochs": 2}, "--epochs and --steps both"),
        ({"image_size": 9}, "do not divide images of 9 x 9"),
        ({"model": "crate_mae_nano_patch2_9"}, "Did you mean crate_mae_nano_patch2_8"),
        ({"model_settings": {"treshold": 0.1}}, 'Did you mean "threshold"'),
        ({"model_settings": {"norm_pix_loss": True}}, "Give --norm-pix-loss instead"),
        ({"mean": (0.5,)}, "--mean and --std belong together"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2)}, "mean has 2 values for 1 channels"),
        ({"mask_ratio": 1.0}, "--mask-ratio is 1.0, but must be between 0 and 1"),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        ({"warmup_epochs": 99.0}, "--warmup-epochs 99 must be shorter than the run of "),
        ({"trackers": ("wanddb",)}, "Unknown tracker wanddb"),
        ({"trackers": ("wandb",)}, "wandb is not installed: pip install"),
        ({"val": "missing"}, "does not exist"),
    ],
)
def test_a_mistake_is_named_and_leaves_no_file(refused, options, expected):
    assert expected in refused(**options)


def test_an_option_that_the_user_did_not_give_is_named_with_its_origin(refused, tmp_path):
    """Of the whole kind: by default, from a recipe, from a stored run."""
    message = refused(data=images(90), recipe="digits", batch_size=None, steps=None, accumulation=3)
    assert message.startswith("A batch of 50 (from the recipe digits) cannot be divided among 1 process x 3")
    run = tmp_path / "stored"
    pretrain("digits:test", out=run, **{**TINY_RUN, "steps": 1})
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("clip_grad: 1.0", "clip_grad: -1.0"))
    with pytest.raises(UserError, match=rf"--clip-grad \(from {run}/config.yaml\) is -1.0, but must be at least 0"):
        resume(run)


def test_an_empty_folder_is_refused(refused, tmp_path):
    (tmp_path / "images").mkdir()
    assert "Found 0 images" in refused(data=tmp_path / "images")


def test_all_mistakes_are_reported_at_once(refused):
    message = refused(model="crate", lr=-1.0, batch_size=5000, trackers=("x",), mask_ratio=0.0)
    for expected in ("Unknown model crate", "--lr is -1.0", "A batch of 5000", "Unknown tracker x", "--mask-ratio"):
        assert expected in message


def test_a_folder_with_something_else_in_it_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    assert "not empty and not a run" in refused()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher has set ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "`fsdp_version: 2`"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "--grad-checkpointing",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "`fsdp_offload_params: false`",
        ),
    ],
)
def test_a_launcher_that_asks_for_what_is_not_there_is_refused(refused, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert expected in refused()


def test_more_processes_than_images_are_refused():
    mistakes = Mistakes()
    with_length(PretrainOptions("images", out="run", accumulation=2), 7, 4, mistakes)
    assert mistakes == [
        "At least 8 images are needed for 4 processes x 2 accumulated micro-batches, but there are 7 to train on: use "
        "fewer processes or a smaller --accumulation."
    ]


def test_more_pairs_to_mix_than_images_are_refused():
    mistakes = Mistakes()
    with_length(
        FinetuneOptions("model", train="images", val="images", out="run", origins={"mixup": GIVEN}), 1, 1, mistakes
    )
    assert mistakes == [
        "At least 2 images are needed for 1 process x 1 accumulated micro-batches (by default) in pairs, as Mixup and "
        "CutMix (by default) need, but there are 1 to train on: use fewer processes or a smaller --accumulation, or "
        "--mixup 0 --cutmix 0."
    ]


def test_a_compiler_that_does_not_work_is_reported_before_anything_is_written(refused, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("No working C++ compiler found\nmany more lines")

    monkeypatch.setattr(torch, "compile", broken)
    message = refused(compile=True)
    assert message.splitlines()[0] == "--compile does not work on this machine: No working C++ compiler found"
    assert "g++" in message


def test_resuming_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "photo.png").touch()
    for path in (tmp_path, tmp_path / "photo.png", tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
            resume(path)


def test_two_images_are_enough(tiny_run):
    run = tiny_run(data=images(2), batch_size=None)
    assert run.config.batch_size == 1


def test_colour_images_of_another_size_get_a_model_that_fits_them(tiny_run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (37, 41, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    config = tiny_run(data=folder, batch_size=None, steps=None, epochs=None, dry_run=True).config
    assert (config.model, config.channels, config.image_size) == (
        "crate_mae_micro_wide_monotone_patch4_32",
        3,
        (32, 32),
    )
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert (config.batch_size, config.steps) == (2, 900)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 1, 1), (100, 1, 8), (300, 1, 32), (4100, 1, 64), (5000, 3, 63), (50_000, 1, 256), (9, 2, 2)],
)
def test_the_default_batch_leaves_enough_steps_to_an_epoch(count, share, expected):
    assert default_batch_size(count, share) == expected


@pytest.mark.parametrize(
    ("init", "layer", "width", "batch", "expected"),
    [
        ("official", "published", 768, 256, 1.5e-4),
        ("official", "published", 192, 256, 6e-4),
        ("official", "published", 192, 64, 1.2e-3),
        ("official", "published", 768, 4096, 3.75e-5),
        ("isometric", "published", 512, 64, 3.6e-3),
        ("isometric", "published", 96, 256, 1.8e-3),
        ("isometric", "published", 1024, 256, 9e-4),
        ("isometric", "monotone", 512, 64, 1.08e-2),  # the recipe small_color
        ("isometric", "compressing", 1024, 256, 2.7e-3),
    ],
)
def test_the_default_learning_rate_falls_with_width_and_batch(init, layer, width, batch, expected):
    model = preset("crate_mae_base_patch16_224").replace(init=init, layer=layer, embed_dim=width, num_heads=1)
    assert default_base_lr(model, batch) == pytest.approx(expected)
