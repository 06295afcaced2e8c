"""Feature files, as other programs read them, and what can go wrong before there is one."""

import csv
import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.covariance import ledoit_wolf

import crate_mae
from crate_mae.commands import embed as embed_module

MODEL = "crate_mae_nano_patch2_8"
DATA = "digits:test"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    crate_mae.save(crate_mae.create_model(MODEL), folder)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    source = crate_mae.data.open_source(DATA)
    pictures = [source.read(i) for i in range(len(source))]
    return crate_mae.load(model).embed(pictures).numpy(), source.labels.tolist()


def test_parquet(model, expected, tmp_path, crate_mae_command):
    out = tmp_path / "new folder" / "ü.parquet"
    code, text, error = crate_mae_command("embed", model, DATA, "--out", out)
    assert code == 0, error
    assert "297 images, 192 numbers each (cls+mean of layer 3)" in text
    table = pq.read_table(out)
    assert table.column_names == ["file", "label", "class", "feature"]
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[192]"
    np.testing.assert_allclose(np.array(table["feature"].to_pylist()), expected[0], atol=1e-5)
    assert table["label"].to_pylist() == expected[1]
    assert table["class"].to_pylist() == [str(label) for label in expected[1]]
    assert all(file.startswith("digits row ") for file in table["file"].to_pylist())
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_csv(model, expected, tmp_path):
    crate_mae.embed(model, DATA, out=tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["file", "label", "class", "f0"]
    values = np.array([[float(row[f"f{i}"]) for i in range(192)] for row in rows])
    np.testing.assert_allclose(values, expected[0], atol=1e-5)
    assert [int(row["label"]) for row in rows] == expected[1]


def test_npz_npy_and_safetensors(model, expected, tmp_path):
    for suffix in ("npz", "npy", "safetensors"):
        result = crate_mae.embed(model, DATA, out=tmp_path / f"f.{suffix}")
        assert (result.images, result.size, result.bad) == (297, 192, [])
    with np.load(tmp_path / "f.npz") as arrays:
        assert set(arrays) == {"features", "labels", "files", "classes"}
        assert arrays["labels"].tolist() == expected[1]
        np.testing.assert_allclose(arrays["features"], expected[0], atol=1e-5)
        files = arrays["files"].tolist()
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected[0], atol=1e-5)
    with safe_open(tmp_path / "f.safetensors", "np") as tensors:
        np.testing.assert_allclose(tensors.get_tensor("features"), expected[0], atol=1e-5)
        assert tensors.get_tensor("labels").tolist() == expected[1]
        assert json.loads(tensors.metadata()["files"]) == files
        assert json.loads(tensors.metadata()["classes"]) == [str(i) for i in range(10)]
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "the user's own permissions, whatever the format"


def test_whitened_features_differ_and_queries_are_treated_alike(model, expected, tmp_path, crate_mae_command):
    code, text, _ = crate_mae_command("embed", model, DATA, "--out", tmp_path / "a.npy")
    assert code == 0 and "features point almost the same way" in text and "--whiten" in text
    transform = tmp_path / "w.safetensors"
    code, text, _ = crate_mae_command("embed", model, DATA, "--out", tmp_path / "b.npy", "--whiten", transform)
    assert code == 0 and "Fitted the whitening on these images" in text and "point almost" not in text
    values = np.load(tmp_path / "b.npy").astype(np.float64)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-3)
    plain = expected[0].astype(np.float64)
    covariance = np.linalg.inv(ledoit_wolf(plain)[0])
    centred = plain - plain.mean(axis=0)
    np.testing.assert_allclose(values @ values.T, centred @ covariance @ centred.T, rtol=1e-2, atol=0.5)
    assert (values @ values.T / np.outer(*[np.linalg.norm(values, axis=1)] * 2)).mean() < 0.1
    few = [torch.from_numpy(np.array(crate_mae.data.open_source(DATA).read(i)))[None] for i in range(3)]
    query = crate_mae.embed(model, few, out=tmp_path / "c.npy", whiten=transform)
    np.testing.assert_allclose(np.load(query.path), values[:3], atol=1e-2)
    for options, words in (
        (["--layer", 0], "another layer"),
        (["--pooling", "mean"], "another pooling"),
        (["--pooling", "tokens"], "one vector per image"),
        (["--whiten", tmp_path / "a.npy"], "must name a .safetensors file"),
        (["--whiten", model / "model.safetensors"], "is not a file that"),
    ):
        tokens = ["--out", tmp_path / "d.npy", "--whiten", transform, *options]
        code, _, error = crate_mae_command(
            "embed", model, DATA, *(tokens if "--whiten" not in options else [*tokens[:2], *options])
        )
        assert code == 2 and words in error
        assert not (tmp_path / "d.npy").exists()


@pytest.mark.parametrize(("source", "side"), [("[]", 3), ("[" * 100_000, 3), ('{"layer": "0"}', 2)])
def test_a_transform_of_other_contents_is_refused(model, tmp_path, crate_mae_command, source, side):
    transform, arrays = tmp_path / "w.safetensors", {"mean": np.zeros(3), "matrix": np.zeros((side, side))}
    save_file(arrays, transform, metadata={"source": source})
    code, _, error = crate_mae_command("embed", model, DATA, "--out", tmp_path / "a.npy", "--whiten", transform)
    assert code == 2 and "is not a file that" in error


def test_tokens_keep_their_shape(model, tmp_path, crate_mae_command):
    crate_mae.embed(model, DATA, out=tmp_path / "t.npy", pooling="tokens")
    tokens = np.load(tmp_path / "t.npy")
    assert tokens.shape == (297, 16, 96)
    crate_mae.embed(model, DATA, out=tmp_path / "t.parquet", pooling="tokens")
    read = np.array(pq.read_table(tmp_path / "t.parquet")["feature"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(read, tokens, atol=1e-6)
    code, _, error = crate_mae_command("embed", model, DATA, "--out", tmp_path / "t.csv", "--pooling", "tokens")
    assert code == 2
    assert "one row per image, which cannot hold its tokens" in error
    assert not (tmp_path / "t.csv").exists()


def test_options_reach_the_features(model, tmp_path, crate_mae_command):
    out = tmp_path / "f.npy"
    tokens = ["--layer", "-2", "--pooling", "mean", "--normalize", "--no-cache", "--batch-size", "100"]
    code, text, error = crate_mae_command("embed", model, DATA, "--out", out, *tokens)
    assert code == 0, error
    assert "mean of layer 2" in text
    np.testing.assert_allclose(np.linalg.norm(np.load(out), axis=1), 1, atol=1e-6)


def test_features_do_not_replace_their_whitening(model, tmp_path, crate_mae_command):
    out = tmp_path / "x.safetensors"
    code, _, error = crate_mae_command("embed", model, DATA, "--out", out, "--whiten", out)
    assert code == 2
    assert "Name two files" in error and not out.exists()


def test_pixels_are_not_said_to_come_from_a_layer(tmp_path, crate_mae_command):
    code, text, error = crate_mae_command("embed", "pixels:8", DATA, "--out", tmp_path / "f.npy")
    assert code == 0, error
    assert "297 images, 192 numbers each (their pixels)" in text


def test_a_model_from_python_and_images_without_labels(tmp_path):
    images = [torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    net = crate_mae.create_model(MODEL)
    crate_mae.embed(net, images, out=tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "feature"]
    np.testing.assert_allclose(np.array(table["feature"].to_pylist()), net.embed(images).numpy(), atol=1e-5)


def test_a_file_that_is_there_stays(model, tmp_path, crate_mae_command):
    out = tmp_path / "f.npy"
    out.write_bytes(b"mine")
    code, _, error = crate_mae_command("embed", model, DATA, "--out", out)
    assert (code, out.read_bytes()) == (2, b"mine")
    assert "--overwrite" in error
    assert crate_mae_command("embed", model, DATA, "--out", out, "--overwrite")[0] == 0
    assert len(np.load(out)) == 297


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError], ids=["Ctrl-C", "memory"])
@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy", "csv", "safetensors"])
def test_an_interrupted_embed_leaves_nothing(model, tmp_path, monkeypatch, suffix, failure):
    from crate_mae.evaluation import embeddings

    def stop_half_way(features, path):
        path.write_bytes(b"half of it")
        raise failure

    monkeypatch.setitem(embeddings._WRITERS, f".{suffix}", stop_half_way)
    with pytest.raises(failure):
        crate_mae.embed(model, DATA, out=tmp_path / f"f.{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _heard_interrupts():
    """SIGINT as a terminal's process has it: one that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard_interrupts")
def test_ctrl_c_while_encoding_ends_quietly(model, tmp_path, monkeypatch, crate_mae_command):
    encoder = type(crate_mae.load(model).encoder)
    monkeypatch.setattr(encoder, "forward_features", lambda self, x: signal.raise_signal(signal.SIGINT))
    code, _, error = crate_mae_command("embed", model, DATA, "--out", tmp_path / "f.npy")
    assert (code, error) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_writing_leaves_nothing(model, tmp_path, monkeypatch, crate_mae_command):
    from crate_mae.evaluation import embeddings

    def stop_half_way(features, path):
        path.write_bytes(b"half of it")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(embeddings._WRITERS, ".npy", stop_half_way)
    usual = signal.getsignal(signal.SIGTERM)
    code, _, error = crate_mae_command("embed", model, DATA, "--out", tmp_path / "f.npy")
    assert (code, error) == (143, "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is usual


def test_unreadable_images_are_listed_and_left_out(model, tmp_path, crate_mae_command):
    folder = tmp_path / "images"
    folder.mkdir()
    source = crate_mae.data.open_source("digits")
    for i in range(4):
        source.read(i).save(folder / f"{i}.png")
    (folder / "1 [broken].png").write_bytes(b"")
    code, text, _ = crate_mae_command("embed", model, folder, "--out", tmp_path / "f.csv")
    assert code == 0
    assert "1 [broken].png: the file is empty" in text
    assert "4 images" in text
    assert len((tmp_path / "f.csv").read_text(encoding="utf-8").splitlines()) == 5
    code, _, error = crate_mae_command("embed", model, folder, "--out", tmp_path / "g.csv", "--max-bad", "0")
    assert code == 2
    assert "more than the limit (a share of 0)" in error
    assert not (tmp_path / "g.csv").exists()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([DATA, "--out", "f.txt"], "must end in one of .parquet .npz .npy .csv .safetensors"),
        ([DATA, "--out", "f.npy", "--layer", "4"], "There is no layer 4"),
        ([DATA, "--out", "f.npy", "--batch-size", "0"], "--batch-size is 0"),
        (["nowhere", "--out", "f.npy"], "does not exist"),
        ([DATA, "--out", "f.npy", "--pooling", "max"], "pooling"),
    ],
)
def test_mistakes_are_named_and_leave_no_file(model, tmp_path, monkeypatch, crate_mae_command, tokens, words):
    monkeypatch.chdir(tmp_path)
    code, _, error = crate_mae_command("embed", model, *tokens)
    assert code == 2
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_random_initialisation_is_reported(tmp_path, crate_mae_command):
    code, text, _ = crate_mae_command("embed", MODEL, DATA, "--out", tmp_path / "f.npy")
    assert code == 0
    assert "random initialisation" in text


def test_the_command_names_every_pooling():
    from typing import get_args, get_type_hints

    from crate_mae.models.features import Pooling

    hint = get_type_hints(embed_module.embed)["pooling"]
    assert {name for part in get_args(hint) for name in get_args(part)} == set(get_args(Pooling))
