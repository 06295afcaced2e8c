"""The pictures of `crate-mae viz`: what is written, and what is refused."""

import pytest
import torch
from PIL import Image

import crate_mae

MODEL = "crate_mae_nano_patch2_8"
KINDS = ("attention", "pca", "layers", "atoms")
NETWORKS = {
    "attention": "timm:test_vit:untrained",
    "pca": "timm:test_resnet:untrained",
    "layers": "timm:test_vit:untrained",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_ending_says_the_format(photos, tmp_path, crate_mae_command, kind, suffix, magic):
    out = tmp_path / "pictures" / f"a[b]{suffix}"
    code, text, error = crate_mae_command("viz", kind, MODEL, photos, "--out", out)
    assert code == 0, error
    assert out.read_bytes().startswith(magic)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert "random initialisation" in text and f"a[b]{suffix}" in "".join(text.split())


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_timm_are_shown(photos, tmp_path, crate_mae_command, kind):
    code, _, error = crate_mae_command("viz", kind, NETWORKS[kind], photos, "--out", tmp_path / "x.png", "--count", 2)
    assert code == 0, error
    assert (tmp_path / "x.png").exists()


def test_options_change_the_picture(photos, tmp_path):
    model = tmp_path / "model"
    crate_mae.save(crate_mae.create_model(MODEL, depth=2, decoder_depth=1), model)
    calls = {
        "attention": [{}, {"stride": 1}, {"layer": 0}, {"count": 1}],
        "pca": [{}, {"joint": True}, {"layer": 0}],
        "layers": [{}, {"control": "random"}],
        "atoms": [{}, {"layer": 0}, {"atoms": (3, 17)}, {"seed": 1}],
    }
    for kind, options in calls.items():
        draw = getattr(crate_mae, f"viz_{kind}")
        outs = [tmp_path / f"{kind}{i}.png" for i in range(len(options))]
        paths = [draw(model, photos, out=o, **{"count": 2, **each}).path for o, each in zip(outs, options, strict=True)]
        assert len({path.read_bytes() for path in paths}) == len(paths), kind
        again = draw(model, photos, out=tmp_path / "again.png", count=2, overwrite=True)
        assert again.path.read_bytes() == paths[0].read_bytes()


def test_to_pictures_are_named_and_unreadable_ones_left_out(photos, tmp_path, capsys):
    (photos / "a broken.png").write_bytes(b"")
    found = crate_mae.viz_pca(MODEL, photos, out=tmp_path / "x.png", count=2)
    assert [path.rpartition("/")[2] for path in found.images] == ["photo 1 ü.png", "photo 0 ü.png"]
    assert "Left out" in capsys.readouterr().out


def test_modules_and_arrays_from_python_are_taken(tmp_path):
    model = crate_mae.create_model(MODEL)
    images = [torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert crate_mae.viz_attention(model, images, out=tmp_path / "a.png").path.exists()
    assert crate_mae.viz_layers(model, images, out=tmp_path / "b.png", control="random").path.exists()
    assert crate_mae.viz_atoms(torch.compile(model), images, out=tmp_path / "c.png", atoms=[3]).path.exists()
    model.encoder.blocks[0].compile()
    with pytest.raises(crate_mae.UserError, match=r"before `torch\.compile`"):
        crate_mae.viz_atoms(model, images, out=tmp_path / "d.png")


def test_a_photograph_smaller_than_a_patch_is_scaled_up(tmp_path, crate_mae_command):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "small.png")
    out = tmp_path / "x.png"
    code, _, error = crate_mae_command("viz", "atoms", MODEL, tmp_path / "small.png", "--out", out, "--atoms", 3, 17)
    assert code == 0 and out.exists(), error


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_there_stays(photos, tmp_path, crate_mae_command, kind):
    out = tmp_path / "mine.png"
    out.write_bytes(b"mine")
    code, _, error = crate_mae_command("viz", kind, MODEL, photos, "--out", out)
    assert (code, out.read_bytes()) == (2, b"mine")
    assert "--overwrite" in error


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["attention", MODEL, "--out", "x.txt"], "must name a .png or .pdf file"),
        (["attention", MODEL, "--out", "x.png", "--stride", "3"], "take one of 1, 2"),
        (["attention", MODEL, "--out", "x.png", "--layer", "4"], "There is no layer 4"),
        (["attention", MODEL, "--out", "x.png", "--count", "0"], "--count is 0"),
        (["attention", "timm:test_resnet:untrained", "--out", "x.png"], "available only for Vision Transformers"),
        (["pca", MODEL, "--out", "x"], "must name a .png or .pdf file"),
        (["pca", "pixels", "--out", "x.png"], "do not lie on a grid"),
        (["layers", "timm:test_resnet:untrained", "--out", "x.png"], "not a Vision Transformer"),
        (["layers", MODEL, "--out", "x.png", "--control", "trained"], "--control"),
        *((["layers", MODEL, "--out", "x.png", "--seed", seed], f"--seed is {seed}") for seed in ("-1", "4294967296")),
        (["atoms", MODEL, "--out", "x.png", "--layer", "4"], "There is no layer 4"),
        (["atoms", MODEL, "--out", "x.png", "--atoms", "3", "999"], "There is no atom 999 in layer"),
        (["atoms", MODEL, "--out", "x.png", "--count", "0"], "--count is 0"),
        (["atoms", "timm:test_vit:untrained", "--out", "x.png"], "A VisionTransformer has no decoder"),
        (["atoms", "vit_mae_nano_patch2_8", "--out", "x.png"], "vit_mae_nano_patch2_8 has no atoms: only the layers"),
        (["reconstruction", MODEL, "--out", "x.txt"], "must name a .png file"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(photos, tmp_path, crate_mae_command, monkeypatch, tokens, words):
    monkeypatch.chdir(tmp_path)
    kind, model, *options = tokens
    code, _, error = crate_mae_command("viz", kind, model, photos, *options)
    assert code == 2
    assert words in " ".join(error.split())
    assert "Traceback" not in error and len(error.strip().splitlines()) <= 4
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_reconstruction_is_the_same_function_under_two_names(photos, tmp_path, crate_mae_command):
    model = tmp_path / "model"
    crate_mae.save(crate_mae.create_model(MODEL), model)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for words, path in zip((["reconstruct"], ["viz", "reconstruction"]), paths, strict=True):
        code, _, error = crate_mae_command(*words, model, photos, "--out", path)
        assert code == 0, error
    assert paths[0].read_bytes() == paths[1].read_bytes()
