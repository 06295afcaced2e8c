"""Fine-tuning on digits: what a run leaves, what it refuses, and that it can be killed like any other."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crate_mae.commands.export import export
from crate_mae.commands.train import resume
from crate_mae.data import open_source
from crate_mae.errors import RunStopped, UserError
from crate_mae.models import create_model
from crate_mae.models.checkpoints import named_checkpoint
from crate_mae.models.classifier import Classifier
from crate_mae.models.weights import load, save
from crate_mae.training.finetuning import Finetuning
from crate_mae.training.options import FinetuneOptions, check
from crate_mae.training.processes import StopRequest
from tests.training.conftest import at_step, weights

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": "", "flip": False, "min_crop": 1.0, "drop_path": 0.0, "ema": 0.0}
DIGITS = [str(i) for i in range(10)]


def labelled(number, classes=2, channels=1, size=(8, 8), first=0):
    """Images of noise with labels first, first + 1, ..., first + classes - 1 in turn."""
    return [
        (torch.rand(channels, *size, generator=torch.Generator().manual_seed(i)), first + i % classes)
        for i in range(number)
    ]


def test_a_run_learns_and_keeps_the_best_model(tiny_finetuning, written_report, capsys):
    options = {
        **PLAIN,
        "batch_size": 128,
        "lr": 3e-2,
        "steps": 60,
        "monitor_steps": 20,
        "layer_decay": 1.0,
        "quiet": False,
    }
    run = tiny_finetuning(**options)
    rows = [row for row in run.metrics() if row["val_accuracy"] is not None]
    assert [row["step"] for row in rows] == [0, 20, 40, 60]
    assert rows[0]["val_accuracy"] < 0.3 and rows[0]["best_score"] is None
    assert rows[-1]["val_accuracy"] > 0.4  # by chance it is 0.1
    assert all(row["val_accuracy"] <= row["val_accuracy_top5"] <= 1 for row in rows)
    best = max(rows[1:], key=lambda row: row["val_accuracy"])
    assert rows[-1]["best_score"] == best["val_accuracy"]
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "command.txt", "environment.json", "log.txt", "metrics.csv"),
        *("checkpoints", "report.html", "model.safetensors", "config.json", "SHA256SUMS", ".lock"),
    }
    assert named_checkpoint(run.path, "best").name == f"step-{best['step']:.0f}"
    model = run.model()
    assert isinstance(model, Classifier)
    assert list(model.config.classes) == DIGITS
    text = capsys.readouterr().out
    plan = [line for line in text[: text.index("Finished")].splitlines() if not line.startswith("step ")]
    assert len(plan) <= 15  # a slow machine tells its steps as well
    assert "1,500 of digits:train; all 297 of digits:test" in text
    assert f"crate-mae predict {run.path} digits:test" in text


def test_the_validation_is_that_of_the_definition(tiny_finetuning):
    run = tiny_finetuning(**PLAIN, lr=1e-2, steps=12, monitor_steps=12)
    source, model = open_source("digits:test"), run.model()
    mean, std = model.config.mean[0], model.config.std[0]
    images = np.stack([np.asarray(source.read(i)) for i in range(len(source))])
    with torch.no_grad():
        logits = model((torch.from_numpy(images)[:, None] / 255 - mean) / std)
    labels = torch.from_numpy(source.labels)
    row = run.metrics()[-1]
    assert row["val_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert row["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    fifth = logits.topk(5, dim=1).indices
    assert row["val_accuracy_top5"] == pytest.approx(float((fifth == labels[:, None]).any(1).double().mean()))


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 0.5), (0.9, 0.9), (0.4, 0.9), (0.9, 0.9)], "90.00% at step 20"),  # the first of two, which is kept
        ([(0.5, 0.5), (0.9, 0.9), (0.5, 0.5), (0.4, 0.5)], "50.00% at step 30"),  # other validation images since then
    ],
)
def test_the_best_is_that_of_the_model_that_is_kept(scores, best):
    rows = [
        {"step": 10.0 * i, "val_accuracy": now, "best_score": so_far} for i, (now, so_far) in enumerate(scores, start=1)
    ]
    assert f"{scores[-1][0]:.2%} now; {best}, the best." in Finetuning.describe_result(None, rows)


def test_a_run_that_ends_before_its_first_validation_has_a_report(
    tiny_finetuning, written_report, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(StopRequest, "signal", signal.SIGTERM)
        tiny_finetuning()
    report = next(tmp_path.glob("*/report.html")).read_text(encoding="utf-8")
    assert (
        "The run has stopped: stopped by SIGTERM and saved after step 1. Accuracy has not been measured yet." in report
    )
    assert "layers.csv" not in report and "pictures/" not in report


def test_the_model_of_the_run_is_the_best_and_not_the_last(tiny_finetuning, monkeypatch):
    scores = iter([0.9, 0.2, 0.5, 0.1, 0.5])  # of steps 0 (which nobody can keep), 5, 10, 15, 20
    measure = Finetuning.measure

    def scored(task, model, step):
        return {**measure(task, model, step), "val_accuracy": next(scores)}

    monkeypatch.setattr(Finetuning, "measure", scored)
    run = tiny_finetuning(monitor_steps=5)
    checkpoints = run.path / "checkpoints"
    assert (checkpoints / "best").read_text() == "step-10\n"
    assert (checkpoints / "last").read_text() == "step-20\n"
    best, last, kept = (
        load_file(path / "model.safetensors") for path in (checkpoints / "step-10", checkpoints / "step-20", run.path)
    )
    assert all(torch.equal(kept[key], best[key]) for key in best)
    assert any(not torch.equal(last[key], best[key]) for key in best)
    assert [row["best_score"] for row in run.metrics() if row["best_score"] is not None] == [0.2, 0.5, 0.5, 0.5]


def test_a_pretrained_encoder_is_where_it_begins(tiny_finetuning, encoder_folder):
    run = tiny_finetuning(**PLAIN, steps=1, lr=1e-30)
    before, after = load(encoder_folder).encoder.state_dict(), run.model().encoder.state_dict()
    assert all(torch.allclose(before[key], after[key]) for key in before)


def test_an_encoder_that_was_exported_alone_is_where_it_begins(tiny_finetuning, encoder_folder, tmp_path):
    export(encoder_folder, format="hf", part="encoder", out=tmp_path / "alone")
    assert weights(tiny_finetuning("one").path) == weights(tiny_finetuning("other", model=tmp_path / "alone").path)


def test_a_name_is_a_random_initialisation_for_the_channels_of_the_images(tiny_finetuning):
    first = tiny_finetuning("a", model="crate_mae_nano_patch2_8", steps=1)
    again = tiny_finetuning("b", model="crate_mae_nano_patch2_8", steps=1)
    assert first.model().config.in_chans == 1
    assert first.model().config.mean == pytest.approx((0.3057,), abs=1e-3)
    assert weights(first.path) == weights(again.path)
    assert weights(first.path) != weights(tiny_finetuning("c", model="crate_mae_nano_patch2_8", steps=1, seed=1).path)


def test_a_run_of_pretraining_and_one_of_fine_tuning_are_models_to_begin_with(tiny_run, tiny_finetuning):
    pretrained = tiny_run("pretrained", steps=2)
    first = tiny_finetuning("first", model=pretrained.path, steps=2)
    second = tiny_finetuning("second", model=first.path, steps=1, lr=1e-30, ema=0.0)
    before, after = first.model().encoder.state_dict(), second.model().encoder.state_dict()
    assert all(torch.allclose(before[key], after[key]) for key in before)


def test_grey_images_and_another_size_are_converted_for_a_colour_model(tiny_finetuning, tmp_path):
    model = create_model("crate_mae_nano_patch2_8", embed_dim=24, num_heads=2, depth=2, decoder_depth=1)
    save(model, tmp_path / "colour")
    run = tiny_finetuning(model=tmp_path / "colour", steps=1, image_size=12)
    config = run.model().config
    assert (config.in_chans, config.image_size) == (3, (12, 12))
    assert run.model().encoder.pos_embed.shape == (1, 37, 24)
    assert run.config.image_size == (12, 12)


def test_a_share_of_the_labels_is_all_that_is_trained_on(tiny_finetuning):
    run = tiny_finetuning(labels=0.1, batch_size=None, steps=None, epochs=2, monitor_steps=None)
    assert run.config.batch_size == 16
    assert run.config.steps == 2 * (150 // 16)
    assert run.metrics()[-1]["step"] == run.config.steps
    assert run.config.monitor_steps == 2 * (150 // 16)  # two epochs of 150 images for 297 to validate on


@pytest.fixture
def usual_signals():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("usual_signals")
def test_a_stopped_run_goes_on_without_the_model_that_it_began_with(tiny_finetuning, encoder_folder, monkeypatch):
    whole = tiny_finetuning("whole", labels=0.1)
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_finetuning("stopped", labels=0.1)
    shutil.rmtree(encoder_folder)
    resumed = resume(whole.path.with_name("stopped"), quiet=True)
    assert weights(resumed.path) == weights(whole.path)
    rows = [(row["step"], row["loss"], row["val_loss"], row["best_score"]) for row in resumed.metrics()]
    assert rows == [(row["step"], row["loss"], row["val_loss"], row["best_score"]) for row in whole.metrics()]


def test_the_folder_of_one_kind_is_refused_for_the_other(tiny_run, tiny_finetuning):
    tiny_run("pretrained", steps=1)
    tiny_finetuning("finetuned", steps=1)
    with pytest.raises(UserError, match=r"holds a run of `crate-mae pretrain`, not of `crate-mae finetune`"):
        tiny_finetuning("pretrained", steps=1)
    with pytest.raises(UserError, match=r"holds a run of `crate-mae finetune`, not of `crate-mae pretrain`"):
        tiny_run("finetuned", steps=1)


def test_another_configuration_is_refused_with_the_differing_options(tiny_finetuning):
    tiny_finetuning(steps=1)
    with pytest.raises(
        UserError, match=r"mixup: 0.8 in that run, 0.5 now \(--mixup\)\n  ema: 0.9999 in that run, 0.9 now \(--ema\)\n"
    ):
        tiny_finetuning(steps=1, mixup=0.5, ema=0.9, log_steps=7)


def test_one_tracker_may_be_given_as_it_is(tiny_finetuning):
    pytest.importorskip("tensorboard")
    run = tiny_finetuning(steps=1, trackers="tensorboard")
    assert run.config.trackers == ("tensorboard",)


@pytest.fixture
def class_folders(tmp_path):
    """`class_folders(name, classes, n, bad)`: n images of each class, of which the first `bad` are none."""

    def make(name, classes, number=8, bad=0):
        for c, cls in enumerate(classes):
            (tmp_path / name / cls).mkdir(parents=True)
            for i in range(number):
                path = tmp_path / name / cls / f"{i}.png"
                pixels = np.random.default_rng([c, i]).integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                if c * number + i < bad:
                    path.write_bytes(b"none")
        return tmp_path / name

    return make


def test_classes_are_matched_by_name_and_not_by_number(tiny_finetuning, class_folders):
    train, val = class_folders("train", ["ant", "bee", "cat"]), class_folders("val", ["ant", "bee", "cat"], number=3)
    images, other = open_source(val), ["cat", "ant", "bee"]

    class Renumbered(list):
        classes = other

    renumbered = Renumbered([(images.read(i), other.index(images.classes[images.label(i)])) for i in range(9)])
    options = {**PLAIN, "train": train, "batch_size": 8, "steps": 6, "lr": 1.0}
    by_folder, by_name = tiny_finetuning("a", val=val, **options), tiny_finetuning("b", val=renumbered, **options)
    assert by_name.model().config.classes == ("ant", "bee", "cat")
    losses = [run.metrics()[-1]["val_loss"] for run in (by_folder, by_name)]
    assert losses[0] == losses[1] != pytest.approx(np.log(3), abs=1e-3)


def test_unreadable_images_are_left_out_of_the_validation_and_listed(tiny_finetuning, class_folders):
    train = class_folders("train", ["ant", "bee"], 10, bad=1)
    run = tiny_finetuning(
        train=train, val=class_folders("val", ["ant", "bee"], 4, bad=2), batch_size=4, max_bad=0.5, steps=5
    )
    listed = (run.path / "bad_files.csv").read_text().splitlines()[1:]
    assert sorted(line.split(",")[1][-9:] for line in listed) == ["ant/0.png", "ant/0.png", "ant/1.png"]
    assert {line.split(",")[0] for line in listed if "/val/" in line} == {"0"}


MISTAKES = {
    "no labels to train on": ({"train": [image for image, _ in labelled(9)]}, "list (--train) has no labels"),
    "no labels to validate on": ({"val": [image for image, _ in labelled(9)]}, "list (--val) has no labels"),
    "other classes": ({"val": labelled(9, 3, first=8)}, "digits:train: 0, 1, 2, 3, 4 and 3 more; only in list: 10"),
    "a class missing": ({"val": labelled(90, 9)}, "only in digits:train: 9"),
    "the same images": ({"val": "digits:train"}, "--train and --val are the same images (digits:train)"),
    "one class": ({"train": labelled(40, 1), "val": labelled(9, 1)}, "are of one class (0)"),
    "nothing to validate on": ({"val": []}, "is empty"),
    "a share too small": ({"labels": 0.001}, "--labels 0.001 leaves no image of 0 (145), 1 (149)"),
    "no share": ({"labels": 0.0}, "--labels is 0.0, but must be more than 0 and at most 1"),
    "odd batch": ({"batch_size": 101}, "take --batch-size 100"),
    "batch too large": ({"batch_size": 2000}, "A batch of 2000 is larger than the 1500 training images"),
    "odd micro-batch": (
        {"batch_size": 50, "accumulation": 2},
        "Mixup (by default) and CutMix (by default) need: take --batch-size 48",
    ),
    "no model": ({"model": "nowhere"}, "does not exist and is not the name of a model"),
    "a model of timm": ({"model": "timm:vit_tiny_patch16_224"}, "cannot be fine-tuned here"),
    "no policy": ({"rand_augment": "strong"}, '--rand-augment "strong" is not understood'),
    "a size of no patches": ({"image_size": 9}, "do not divide images of 9 x 9"),
    "too steep": ({"layer_decay": 1.5}, "--layer-decay is 1.5"),
    "endless memory": ({"ema": 1.0}, "--ema is 1.0, but must be at least 0 and less than 1"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_leaves_no_file(tiny_finetuning, tmp_path, options, expected):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        tiny_finetuning(**options)
    assert expected in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("steps", 2.5, "--steps is 2.5, but must be a whole number"),
        ("steps", "ten", "--steps is 'ten', but must be a number"),
        ("pooling", "max", "--pooling is max, but must be one of cls, mean, cls+mean"),
    ],
)
def test_a_value_of_a_wrong_type_from_python_is_a_sentence(option, value, expected):
    mistakes = check(FinetuneOptions("model", train="train", val="val", out="run", **{option: value}))
    assert mistakes == [expected + "."] and mistakes.options == {option}


def test_a_model_of_channels_that_cannot_be_converted_is_refused(tiny_finetuning, tmp_path):
    model = create_model("crate_mae_nano_patch2_8", in_chans=2, embed_dim=24, num_heads=2, depth=1, decoder_depth=1)
    save(model, tmp_path / "two")
    with pytest.raises(UserError, match="takes images of 2 channels, but those of digits:train have 1"):
        tiny_finetuning(model=tmp_path / "two")


def test_validation_images_that_cannot_be_read_are_reported_before_anything_is_written(
    tiny_finetuning, class_folders, tmp_path
):
    train, val = class_folders("train", ["ant", "bee"]), class_folders("val", ["ant", "bee"], 4, bad=8)
    with pytest.raises(UserError, match="8 of 8 validation images cannot be read"):
        tiny_finetuning(train=train, val=val, batch_size=4)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_are_reported_at_once(tiny_finetuning):
    with pytest.raises(UserError) as refused:
        tiny_finetuning(model="nowhere", lr=-1.0, batch_size=5000, trackers=("x",), labels=2.0)
    for expected in (
        "nowhere does not exist",
        "--lr is -1.0",
        "A batch of 5000",
        "Unknown tracker x",
        "--labels is 2.0",
    ):
        assert expected in str(refused.value)
