"""Pictures of completed images, and what can go wrong with them."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import crate_mae

MODEL = "crate_mae_nano_patch2_8"


def test_the_picture_and_its_quality_are_made(photos, tmp_path, crate_mae_command):
    out = tmp_path / "pictures" / "completed.png"
    code, text, error = crate_mae_command("reconstruct", MODEL, photos, "--out", out, "--count", 2)
    assert code == 0, error
    assert "PSNR" in text
    with Image.open(out) as picture:
        assert picture.width > 100
    assert [p.name for p in out.parent.iterdir()] == ["completed.png"]


def test_images_are_evenly_spaced_among_all(tmp_path):
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)]
    found = crate_mae.reconstruct(MODEL, images, out=tmp_path / "a.png", count=2)
    assert found.images == ["list[0]", "list[3]"]
    assert crate_mae.viz_pca(MODEL, images, out=tmp_path / "b.png", count=2).images == found.images


def test_the_same_seed_makes_the_same_picture(photos, tmp_path):
    model = tmp_path / "model"
    crate_mae.save(crate_mae.create_model(MODEL), model)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        crate_mae.reconstruct(str(model), str(photos), out=path, seed=seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_a_picture_that_is_there_stays(photos, tmp_path, crate_mae_command):
    out = tmp_path / "mine.png"
    out.write_bytes(b"mine")
    code, _, error = crate_mae_command("reconstruct", MODEL, photos, "--out", out)
    assert (code, out.read_bytes()) == (2, b"mine")
    assert "--overwrite" in error
    assert crate_mae_command("reconstruct", MODEL, photos, "--out", out, "--overwrite")[0] == 0
    assert out.read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.txt"], "must name a .png file"),
        (["--out", "x.png", "--count", "0"], "--count is 0"),
        (["--out", "x.png", "--mask-ratio", "1.5"], "mask_ratio is 1.5"),
        (["--out", "x.png", "--mask-ratio", "0"], "hides none of 16 patches"),
    ],
)
def test_options_that_make_no_sense_are_named(photos, tmp_path, crate_mae_command, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    code, _, error = crate_mae_command("reconstruct", MODEL, photos, *options)
    assert code == 2
    assert words in error
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: torch.save({"a": torch.zeros(2)}, weights), "cannot be read as safetensors"),
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-100]), "cut short"),
        (lambda weights: save_file({"a": torch.zeros(2)}, weights), "weights of another model"),
    ],
    ids=["pickle", "cut short", "another model"],
)
def test_damaged_models_are_named(photos, tmp_path, crate_mae_command, damage, words):
    crate_mae.save(crate_mae.create_model(MODEL), tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    code, _, error = crate_mae_command("reconstruct", tmp_path / "model", photos, "--out", tmp_path / "x.png")
    assert code == 2
    assert words in error
    assert not (tmp_path / "x.png").exists()


def test_names_with_brackets_are_shown_as_they_are(tmp_path, crate_mae_command):
    folder = tmp_path / "cuts["
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "red] [final].png")
    code, text, error = crate_mae_command("reconstruct", MODEL, folder, "--out", tmp_path / "y[final].png")
    assert code == 0, error
    assert "[final].png" in text  # a narrow terminal wraps the long name before that
    assert "y[final].png" in "".join(text.split())


def test_unreadable_images_are_left_out_and_said(photos, tmp_path, crate_mae_command):
    (photos / "a broken.png").write_bytes(b"")
    code, text, _ = crate_mae_command("reconstruct", MODEL, photos, "--out", tmp_path / "x.png")
    assert code == 0
    assert "Left out" in text
    assert "a broken.png" in text


def test_nothing_but_unreadable_images_is_a_mistake(tmp_path, crate_mae_command):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not a picture")
    code, _, error = crate_mae_command("reconstruct", MODEL, folder, "--out", tmp_path / "x.png")
    assert code == 2
    assert "can be read" in error
    assert not (tmp_path / "x.png").exists()
