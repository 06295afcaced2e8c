"""Predicting classes: what the file holds, and what is refused."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import crate_mae
from crate_mae.data import evaluation_transform, open_source
from crate_mae.models.classifier import build_classifier
from crate_mae.models.config import ClassifierConfig


@pytest.fixture
def model(tmp_path):
    """A folder with a classifier of digits that has learned nothing, but has opinions."""
    torch.manual_seed(3)
    encoder = crate_mae.create_model(
        "crate_mae_nano_patch2_8", embed_dim=24, num_heads=2, depth=1, decoder_depth=1, in_chans=1
    ).config
    net = build_classifier(ClassifierConfig(encoder=encoder, classes=tuple(str(i) for i in range(10))))
    torch.nn.init.normal_(net.head.weight)
    source = open_source("digits:train")
    transform = evaluation_transform((8, 8), 1, encoder.mean, encoder.std)
    with torch.no_grad():  # so that no class is the answer to everything
        net.head.bias -= net.eval()(torch.stack([transform(source.read(i)) for i in range(50)])).mean(dim=0)
    crate_mae.save(net, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures, one of which is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"none")
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_image_with_the_probability_of_each_class(model, tmp_path, capsys):
    result = crate_mae.predict(model, "digits:test", out=tmp_path / "p.csv", batch_size=50)
    rows = rows_of(tmp_path / "p.csv")
    digits = [f"p_{i}" for i in range(10)]
    assert list(rows[0]) == ["file", "prediction", "probability", "label", *digits]
    assert len(rows) == 297
    for row in rows:
        probabilities = [float(row[key]) for key in digits]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert float(row["probability"]) == max(probabilities)
        assert digits[int(np.argmax(probabilities))] == f"p_{row['prediction']}"
    accuracy = np.mean([row["prediction"] == row["label"] for row in rows])
    assert result.accuracy == pytest.approx(accuracy)
    assert len({row["prediction"] for row in rows}) > 1
    assert [row["file"] for row in rows] == result.files
    assert [row["prediction"] for row in rows] == result.predicted
    assert f"Accuracy: {accuracy:.2%} of 297 images" in capsys.readouterr().out


def test_predictions_are_those_of_the_model(model, tmp_path):
    result = crate_mae.predict(model, "digits:test", out=tmp_path / "p.csv")
    net = crate_mae.load(model)
    source = open_source("digits:test")
    transform = evaluation_transform((8, 8), 1, net.config.mean, net.config.std)
    with torch.no_grad():
        probabilities = net(torch.stack([transform(source.read(i)) for i in range(7)])).softmax(1)
    assert result.predicted[:7] == [str(int(i)) for i in probabilities.argmax(1)]
    assert result.probability[:7] == pytest.approx(probabilities.max(1).values.tolist(), rel=1e-5)


def test_predictions_of_an_untrained_model_are_said_to_be_so(model, tmp_path, capsys):
    crate_mae.predict(f"{model}:untrained", "digits:test", out=tmp_path / "p.csv")
    assert f"{model}:untrained has a random initialisation" in capsys.readouterr().out


def test_predicting_again_gives_the_same_bytes(model, tmp_path):
    for name in ("a.csv", "b.csv"):
        crate_mae.predict(model, "digits:test", out=tmp_path / name)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_unreadable_images_are_listed_and_left_out_and_without_labels_there_is_no_accuracy(
    model, pictures, tmp_path, capsys
):
    result = crate_mae.predict(model, pictures, out=tmp_path / "p.csv", batch_size=1)
    rows = rows_of(tmp_path / "p.csv")
    assert [row["file"][-5:] for row in rows] == ["0.png", "1.png", "3.png", "4.png"]
    assert "label" not in rows[0] and result.accuracy is None
    text = capsys.readouterr().out
    assert "Left out" in text and "2.png" in text and "Accuracy" not in text


def test_labels_of_other_classes_give_no_accuracy_and_say_so(model, tmp_path, capsys):
    images = [(torch.rand(1, 8, 8), 7 + i) for i in range(5)]
    assert crate_mae.predict(model, images, out=tmp_path / "p.csv").accuracy is None
    assert "labels of other classes" in capsys.readouterr().out


def test_a_file_that_is_there_is_kept_unless_told_otherwise(model, tmp_path, crate_mae_command):
    out = tmp_path / "p.csv"
    out.write_text("mine")
    code, _, error = crate_mae_command("predict", model, "digits:test", "--out", out)
    assert code == 2 and "exists already" in error and out.read_text() == "mine"
    code, text, _ = crate_mae_command("predict", model, "digits:test", "-o", out, "--overwrite")
    assert code == 0 and "Saved 297 predictions" in text and len(rows_of(out)) == 297


def test_mistakes_are_sentences_and_leave_no_file(model, pictures, tmp_path):
    for name in ("0", "1", "3", "4"):
        (pictures / f"{name}.png").write_bytes(b"")
    for arguments, words in (
        (("crate_mae_nano_patch2_8", "digits:test"), "is an autoencoder and has no classes"),
        ((model, pictures), "No image of .* can be read"),
        ((model, "nowhere"), "does not exist"),
        (("nowhere", "digits:test"), "A model is a run folder"),
    ):
        with pytest.raises(crate_mae.UserError, match=words):
            crate_mae.predict(*arguments, out=tmp_path / "p.csv")
    with pytest.raises(crate_mae.UserError, match=r"must name a \.csv file"):
        crate_mae.predict(model, "digits:test", out=tmp_path / "p.txt")
    assert not list(tmp_path.glob("p.*"))
