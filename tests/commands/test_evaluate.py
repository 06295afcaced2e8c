"""The probes and the measures of completions, as commands: their files, their tables, and what they refuse."""

import json
import math
import re

import pytest
import torch
from PIL import Image

import crate_mae
from crate_mae.evaluation.reconstruction import nested_masks
from crate_mae.models.weights import save_tensors

MODEL = "crate_mae_nano_patch2_8"
KINDS = ["knn", "linear", "fewshot"]
DIGITS = ["--train", "digits:train", "--val", "digits:test"]
FEW_DIGITS = ["--train", "digits:test", "--val", "digits:train"]  # a probe of fewer images is fitted sooner


@pytest.fixture
def photos(class_folder):
    return class_folder("train", {"red": 12, "green": 9}), class_folder("val", {"red": 5, "green": 4}, seed=1)


def evaluate(kind, model, train, val, **options):
    return getattr(crate_mae, f"eval_{kind}")(model, train=train, val=val, **options).report


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_of_digits_is_better_than_guessing_and_written_down(kind, tmp_path, crate_mae_command):
    out = tmp_path / "results" / "eval.json"
    options = ["--draws", "3"] if kind == "fewshot" else []
    code, text, error = crate_mae_command("eval", kind, MODEL, *FEW_DIGITS, "--out", out, "--seed", "5", *options)
    assert code == 0, error
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["probe"] == kind
    assert report["model"] == MODEL
    assert report["random_initialisation"]
    assert (report["train"], report["val"]) == ("digits:test", "digits:train")
    assert (report["train_images"], report["val_images"]) == (297, 1500)
    assert report["classes"] == [str(i) for i in range(10)]
    assert (report["pooling"], report["seed"], report["image_size"]) == ("cls+mean", 5, [8, 8])
    assert {"crate-mae", "torch", "timm", "scikit-learn"} <= set(report["versions"])
    layers = [result["layer"] for result in report["results"]]
    assert layers == ([3, 3, 3] if kind == "fewshot" else [0, 1, 2, 3])
    for result in report["results"]:
        score = result["accuracy" if kind == "fewshot" else "top1"]
        assert 0.13 < score["low"] < score["value"] < score["high"] < 1
        assert f"{100 * score['value']:.2f}%" in text
    if kind != "fewshot":
        assert report["results"][0]["top5"]["value"] > report["results"][0]["top1"]["value"]
    assert "random initialisation" in text
    assert "features point almost the same way" in text and "Probes standardise them" in text
    assert [path.name for path in out.parent.iterdir()] == ["eval.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_python_gives_what_the_command_writes(kind, photos, tmp_path):
    options = {"k": 3} if kind == "knn" else {"shots": (1, 2), "draws": 2} if kind == "fewshot" else {}
    result = getattr(crate_mae, f"eval_{kind}")(
        MODEL, train=photos[0], val=photos[1], out=tmp_path / "e.json", **options
    )
    assert result.path == tmp_path / "e.json"
    assert json.loads(result.path.read_text(encoding="utf-8")) == json.loads(json.dumps(result.report))
    assert result.report["classes"] == ["green", "red"]
    assert result.report["train"] == str(photos[0])
    again = evaluate(kind, MODEL, *photos, cache=False, **options)
    assert again == result.report


def test_colours_are_told_apart_by_pixels_and_by_a_timm_network(photos):
    report = evaluate("knn", "pixels:8", *photos, k=5)
    assert report["results"][0]["top1"]["value"] == 1.0
    assert report["results"][0]["top5"] is None
    assert report["pooling"] == "mean"
    assert not report["random_initialisation"]
    report = evaluate("linear", "timm:test_resnet:untrained", *photos, batch_size=7)
    assert report["results"][0]["top1"]["value"] == 1.0


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_all_layers_have_a_row_each(kind, photos, crate_mae_command, tmp_path):
    out = tmp_path / "all.json"
    train, val = photos
    options = ["--no-controls", "--k", "3"] if kind == "knn" else ["--no-controls"]
    tokens = ["--train", train, "--val", val, "--layer", "all", "--out", out, *options]
    code, _, error = crate_mae_command("eval", kind, MODEL, *tokens)
    assert code == 0, error
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    single = evaluate(kind, MODEL, train, val, layer=-3, **({"k": 3} if kind == "knn" else {}))
    only = json.loads(json.dumps(single["results"][0]))
    if kind == "knn":
        assert only.pop("chosen_on") is None, "there is nothing to choose"
        rows[1].pop("chosen_on")
    assert rows[1] == only


@pytest.mark.parametrize("kind", [*KINDS, "reconstruction"])
def test_json_is_all_that_stands_on_the_standard_output(kind, trained, photos, crate_mae_command, tmp_path):
    out, (train, val) = tmp_path / "all.json", photos
    data = [val, "--mask-ratios", "0.5"] if kind == "reconstruction" else ["--train", train, "--val", val]
    options = {"knn": ["--k", "3"], "fewshot": ["--shots", "2", "--draws", "2"]}.get(kind, [])
    code, text, messages = crate_mae_command("eval", kind, trained, *data, *options, "--json", "--out", out)
    assert code == 0, messages
    assert json.loads(text) == json.loads(out.read_text(encoding="utf-8"))
    assert f"Saved {out}" in messages


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network whose weights are not those of any seed: nearly all of it is one direction of brightness."""
    net = crate_mae.create_model(MODEL)
    with torch.no_grad():
        net.encoder.patch_embed.proj.weight.mul_(5)
    folder = tmp_path_factory.mktemp("trained") / "model"
    crate_mae.save(net, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_controls_stand_beside_the_model_unasked(kind, trained, photos, crate_mae_command, tmp_path):
    options = {"knn": ["--k", "3"], "linear": [], "fewshot": ["--shots", "1", "--draws", "3"]}[kind]
    tokens = ["--train", photos[0], "--val", photos[1], "--seed", "4", *options]
    code, text, error = crate_mae_command("eval", kind, trained, *tokens, "--out", tmp_path / "with.json")
    assert code == 0, error
    report = json.loads((tmp_path / "with.json").read_text(encoding="utf-8"))
    untrained, pixels = report["controls"]
    assert (untrained["model"], untrained["random_initialisation"]) == (f"{trained}:untrained", True)
    assert (pixels["model"], len(pixels["results"])) == ("pixels", 1)
    assert report["chance"]["value"] == pytest.approx(5 / 9), "most training images are red, as 5 of 9 others are"
    assert report["verdict"] in text
    assert "55.56%" in text
    # The control is the model of that name, with the same seed.
    choices = {"knn": {"k": 3}, "linear": {}, "fewshot": {"shots": (1,), "draws": 3}}[kind]
    alone = evaluate(kind, f"{trained}:untrained", *photos, seed=4, **choices)
    assert json.loads(json.dumps(alone["results"])) == untrained["results"]
    assert [control["model"] for control in alone["controls"]] == ["pixels"]
    bare = evaluate(kind, trained, *photos, controls=False, **choices)
    assert (bare["controls"], bare["verdict"]) == ([], None)


def test_features_that_are_no_better_than_untrained_ones_are_called_so(trained, class_folder):
    val = class_folder("many", {"red": 60, "green": 60}, seed=1)
    report = evaluate("linear", trained, class_folder("train", {"red": 12, "green": 9}), val)
    assert re.search(r"no better than layer \d of random initialisation on these images", report["verdict"])


def test_equal_completions_have_an_interval_of_no_width():
    from crate_mae.commands.reconstruct import _verdict
    from crate_mae.evaluation.reconstruction import CompletionScore

    def score(psnr, half_width):
        return CompletionScore(0.75, 12, 1.0, 1.0, psnr, 0.5, half_width)

    assert "80.00 dB WORSE" in _verdict("it", [score(20.0, 0.0)], {"flat patches": [score(100.0, 0.0)]})
    assert "no better than" in _verdict("it", [score(20.0, None)], {"flat patches": [score(100.0, 0.0)]})


def test_a_layer_is_chosen_by_training_images(trained, photos, monkeypatch):
    from crate_mae.commands.evaluate import _verdict
    from crate_mae.evaluation import probing
    from crate_mae.evaluation.probes import KnnResult, Score

    rows = [(0, 0.9, 0.1), (1, 0.2, 0.95), (2, 0.5, 0.3)]  # layer, on the tenth, on the validation images
    scores = iter(rows)

    def run(train, val, classes):
        _, chosen_on, top1 = next(scores, (0, 0.5, 0.5))
        return [KnnResult(Score(top1, top1 - 0.01, top1 + 0.01), None, 3, chosen_on)]

    how = probing.Extraction(layers=(0, 1, 2), workers=0)
    probed = probing.probe(trained, *photos, run, extraction=how, with_controls=True)
    assert probed.chosen()[0] == 0
    assert _verdict(probed).startswith(f"Layer 0 of {trained} (10.0%), chosen on training images: 40.0 points WORSE")


def test_all_layers_are_probed_only_where_that_is_cheap(trained, photos, monkeypatch):
    from crate_mae.evaluation import probing

    monkeypatch.setattr(probing, "MOST_NUMBERS", 21 * 192 * 4)
    assert len(evaluate("linear", trained, *photos, controls=False)["results"]) == 4
    monkeypatch.setattr(probing, "MOST_NUMBERS", 21 * 192 * 4 - 1)
    (result,) = evaluate("linear", trained, *photos, controls=False)["results"]
    assert result["layer"] == 3


def test_classes_are_compared_by_name_not_by_number(class_folder):
    """In `val`, green is class 0 and red class 1; in `train`, blue is class 0."""
    train = class_folder("train", {"red": 9, "green": 9, "blue": 9})
    val = class_folder("val", {"red": 4, "green": 4}, seed=1)
    report = evaluate("knn", "pixels:8", train, val, k=5)
    assert report["classes"] == ["blue", "green", "red"]
    assert report["results"][0]["top1"]["value"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_labels_is_refused(kind, photos, class_folder, crate_mae_command):
    train, val = photos
    for option, data in {"--train": (train / "red", val), "--val": (train, val / "red")}.items():
        code, _, error = crate_mae_command("eval", kind, MODEL, "--train", data[0], "--val", data[1])
        assert code == 2
        assert f"red ({option}) has no labels" in error


@pytest.mark.parametrize("kind", KINDS)
def test_validation_images_of_other_classes_are_refused_by_name(kind, photos, class_folder, crate_mae_command):
    other = class_folder("other", {"red": 3, "blue": 3})
    code, _, error = crate_mae_command("eval", kind, MODEL, "--train", photos[0], "--val", other)
    assert code == 2
    assert "other: blue." in error
    assert ": green; only in" in error
    assert len(error.strip().splitlines()) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_is_refused(kind, crate_mae_command):
    images = [(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)), 4) for i in range(3)]
    with pytest.raises(crate_mae.UserError, match=r"are of one class \(4\): a classifier needs at least two classes"):
        evaluate(kind, MODEL, images, images[:2])


@pytest.mark.parametrize(("kind", "needed"), [("linear", 2), ("fewshot", 10)])
def test_a_class_with_too_few_images_is_named(kind, needed, class_folder, photos):
    train = class_folder("few", {"red": 12, "green": 1})
    with pytest.raises(crate_mae.UserError) as error:
        evaluate(kind, MODEL, train, photos[1])
    assert f"Class green has 1 training image(s), but this probe needs {needed} of each class." in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_test_set_is_refused(kind, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(crate_mae.UserError, match="Found 0 images"):
        evaluate(kind, MODEL, photos[0], tmp_path / "empty")
    with pytest.raises(crate_mae.UserError, match="is empty"):
        evaluate(kind, MODEL, photos[0], [])


@pytest.mark.parametrize("kind", KINDS)
def test_testing_on_the_training_images_is_refused(kind, photos):
    with pytest.raises(crate_mae.UserError, match="are the same images"):
        evaluate(kind, MODEL, photos[0], photos[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_hold_nan_are_refused(kind, photos, tmp_path, crate_mae_command):
    net = crate_mae.create_model(MODEL)
    with torch.no_grad():
        net.encoder.norm.bias[0] = torch.nan
    save_tensors(net.state_dict(), net.config, tmp_path / "model")
    tokens = ["--train", photos[0], "--val", photos[1], "--out", tmp_path / "e.json"]
    code, _, error = crate_mae_command("eval", kind, tmp_path / "model", *tokens)
    assert code == 2
    assert "not finite, in 1 tensor(s) such as encoder.norm.bias" in error
    assert not (tmp_path / "e.json").exists()


def test_unreadable_images_are_left_out_listed_and_written_down(photos, crate_mae_command, tmp_path):
    train, val = photos
    (val / "red" / "0.png").write_bytes(b"")
    tokens = ["--train", train, "--val", val, "--k", "3", "--max-bad", "0.2", "--out", tmp_path / "e.json"]
    code, text, error = crate_mae_command("eval", "knn", MODEL, *tokens)
    assert code == 0, error
    assert "Left out: " in text
    report = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert report["val_images"] == 8
    assert report["left_out"] == [[str(val / "red" / "0.png"), "the file is empty (0 bytes)"]]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["knn", MODEL, *DIGITS, "--out", "x.csv"], "--out x.csv must name a .json file"),
        (["knn", MODEL, *DIGITS, "--out", "there.json"], "exists already"),
        (["knn", MODEL, *DIGITS, "--k", "0"], "--k is 0"),
        (["linear", MODEL, *DIGITS, "--seed", "-1"], "--seed is -1, but must be between 0 and 4,294,967,295"),
        (["fewshot", MODEL, *DIGITS, "--seed", "9999999999999"], "--seed is 9999999999999"),
        (["reconstruction", MODEL, "digits", "--seed", "-1"], "--seed is -1"),
        (["knn", MODEL, *DIGITS, "--k", "1501"], "cannot vote among 1500 training images"),
        (["linear", MODEL, *DIGITS, "--layer", "7"], "There is no layer 7"),
        (["linear", MODEL, *DIGITS, "--layer", "some"], "--layer"),
        (["fewshot", MODEL, *DIGITS, "--draws", "0"], "--draws is 0"),
        (["fewshot", MODEL, *DIGITS, "--shots", "0", "5"], "--shots is 0"),
        (["fewshot", MODEL, *DIGITS, "--shots", "999"], "needs 999 of each class"),
        (["linear", "timm:test_resnet:untrained", *DIGITS, "--pooling", "cls"], "no class token"),
        (["linear", MODEL, *DIGITS, "--pooling", "tokens"], "pooling"),
        (["reconstruction", MODEL, "digits", "--out", "x.png"], "--out x.png must name a .json file"),
        (["reconstruction", MODEL, "digits", "--picture", "x.json"], "--picture x.json must name a .png file"),
        (["reconstruction", MODEL, "digits", "--out", "there.json"], "exists already"),
        (["reconstruction", MODEL, "digits", "--count", "0"], "--count is 0"),
        (["reconstruction", MODEL, "digits", "--mask-ratios", "0.5", "1.5"], "mask_ratio is 1.5"),
        (["reconstruction", MODEL, "digits", "--mask-ratios", "0"], "hides none of 16 patches"),
        (["reconstruction", "pixels", "digits"], "A model is a run folder"),
        (["nearest", MODEL], "nearest"),
    ],
)
def test_mistakes_are_named_and_leave_no_file(tokens, words, tmp_path, monkeypatch, crate_mae_command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    code, _, error = crate_mae_command("eval", *tokens)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"


def test_reconstruction_is_measured_at_every_ratio(tmp_path, crate_mae_command, monkeypatch):
    from crate_mae.evaluation import reconstruction

    shown = []

    def complete_and_note(model, images, mask):
        shown.append(mask)
        return complete(model, images, mask)

    complete = reconstruction.complete_in_batches
    monkeypatch.setattr(reconstruction, "complete_in_batches", complete_and_note)
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    tokens = ["--count", "50", "--mask-ratios", "0.5", "0.75", "--out", out, "--picture", picture]
    code, text, error = crate_mae_command("eval", "reconstruction", MODEL, "digits:test", *tokens)
    assert code == 0, error
    report = json.loads(out.read_text(encoding="utf-8"))
    assert (report["images"], report["norm_pix_loss"], report["data"]) == (50, False, "digits:test")
    assert [(row["mask_ratio"], row["hidden"]) for row in report["results"]] == [(0.5, 8), (0.75, 12)]
    for row in report["results"]:
        assert all(math.isfinite(row[key]) for key in ("mse", "normalised_mse", "psnr", "ssim"))
        assert f"{row['psnr']:.2f} ± {row['psnr_half_width']:.2f} dB" in text
    with Image.open(picture) as image:
        assert image.height > 5 * 100  # the original, and two rows for each ratio
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]
    measured = reconstruction.nested_masks(50, 16, 0.5, 0)
    assert torch.equal(shown[0], measured[[0, 6, 12, 18, 25, 31, 37, 43]])  # those of the images that are shown


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_errors_are_the_losses_of_training(norm_pix_loss, tmp_path):
    """The loss of the model itself on the same images and masks is one of the two errors, in its own units."""
    torch.manual_seed(0)
    net = crate_mae.create_model(MODEL, norm_pix_loss=norm_pix_loss).eval()
    crate_mae.save(net, tmp_path / "model")
    images = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    report = crate_mae.eval_reconstruction(tmp_path / "model", images, mask_ratios=(0.6,), seed=3, batch_size=2).report
    transform = crate_mae.data.transforms.evaluation_transform((8, 8), 3, net.config.mean, net.config.std)
    batch = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        loss = net(batch, mask_ratio=0.6, generator=torch.Generator().manual_seed(3)).loss
    assert report["results"][0]["normalised_mse" if norm_pix_loss else "mse"] == pytest.approx(float(loss), rel=1e-5)


def test_completions_are_compared_with_an_untrained_network_and_with_flat_patches(capsys):
    """A flat patch has the mean of all visible pixels."""
    torch.manual_seed(0)
    model = crate_mae.create_model(MODEL, in_chans=1, mean=(0.5,), std=(0.5,)).eval()
    images = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    report = crate_mae.eval_reconstruction(model, images, mask_ratios=(0.5, 0.75), seed=1).report
    untrained, flat = report["controls"]
    assert [each["model"] for each in (untrained, flat)] == ["MaskedAutoencoder:untrained", "flat patches"]
    assert untrained["results"][0]["mse"] != report["results"][0]["mse"]
    for result in flat["results"]:
        masks = nested_masks(3, 16, result["mask_ratio"], 1)
        errors = []
        for image, mask in zip(images, masks, strict=True):
            hidden = mask.reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
            pixels = 2 * image[0] - 1
            errors.append((pixels[hidden] - pixels[~hidden].mean()).square().mean())
        assert result["mse"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert report["verdict"].startswith("With 75% hidden, completions of MaskedAutoencoder (")
    assert "than random initialisation" in report["verdict"] and "than flat patches" in report["verdict"]
    alone = crate_mae.eval_reconstruction(model, images, mask_ratios=(0.5,), seed=1, controls=False).report
    assert alone["results"] == report["results"][:1] and alone["controls"] == [] and alone["verdict"] is None


def test_scores_do_not_depend_on_the_batch_and_repeat(tmp_path):
    net = tmp_path / "model"
    crate_mae.save(crate_mae.create_model(MODEL), net)
    reports = [
        crate_mae.eval_reconstruction(net, "digits:test", count=20, batch_size=size, mask_ratios=(0.7,)).report
        for size in (20, 20, 7)
    ]
    assert reports[0] == reports[1]
    for key, value in reports[0]["results"][0].items():
        assert reports[2]["results"][0][key] == pytest.approx(value, rel=1e-5)


def test_normalised_targets_and_left_out_images_are_said(photos, tmp_path, crate_mae_command):
    (photos[1] / "red" / "1.png").write_bytes(b"")
    crate_mae.save(crate_mae.create_model(MODEL, norm_pix_loss=True), tmp_path / "model")
    code, text, _ = crate_mae_command("eval", "reconstruction", tmp_path / "model", photos[1])
    assert code == 0
    assert "come from the original: targets were normalised" in text
    assert "Left out" in text


def test_a_classifier_has_nothing_to_complete_with(tmp_path, crate_mae_command):
    from crate_mae.models.classifier import build_classifier
    from crate_mae.models.config import ClassifierConfig
    from crate_mae.models.presets import preset

    config = ClassifierConfig(encoder=preset(MODEL), classes=("cat", "dog"), pooling="cls")
    crate_mae.save(build_classifier(config), tmp_path / "model")
    for tokens in (["eval", "reconstruction"], ["reconstruct"]):
        options = ["--out", tmp_path / "x.png"] if tokens == ["reconstruct"] else []
        code, _, error = crate_mae_command(*tokens, tmp_path / "model", "digits", *options)
        assert code == 2
        assert "is a classifier and has no decoder" in error
    assert crate_mae_command("eval", "knn", tmp_path / "model", *DIGITS)[0] == 0
