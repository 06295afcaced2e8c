"""Features of whole data sources, unreadable images, and the cache."""

import errno
import functools
import os
import shutil

import numpy as np
import pytest
import torch

import crate_mae
from crate_mae.data import open_source
from crate_mae.errors import UserError
from crate_mae.evaluation import extract as extract_module
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, FeatureCache, extract

MODEL = "crate_mae_nano_patch2_8"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return crate_mae.create_model(MODEL)


@pytest.fixture
def folder(class_folder):
    return class_folder("images", {"blue": 5, "red": 7})


@pytest.fixture
def calls(model, monkeypatch):
    """Sizes of the batches that the encoder was given."""
    sizes = []
    forward = type(model.encoder).forward_features
    monkeypatch.setattr(
        type(model.encoder), "forward_features", lambda self, x: sizes.append(len(x)) or forward(self, x)
    )
    return sizes


def only(backbone, data, **options):
    (features,) = extract(backbone, open_source(data), Extraction(**options))
    return features


def test_features_are_those_of_embed_with_labels_and_places(model, folder):
    features = only(open_backbone(model), folder, batch_size=5)
    paths = sorted(folder.rglob("*.png"))
    np.testing.assert_allclose(features.values, model.embed(paths).numpy(), atol=1e-5)
    assert features.values.dtype == np.float32
    assert features.labels.tolist() == [0] * 5 + [1] * 7
    assert features.classes == ["blue", "red"]
    assert features.locations == [str(path) for path in paths]
    assert (features.layer, features.pooling, features.bad) == (3, "cls+mean", ())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_loader_processes_change_nothing(model, folder):
    backbone = open_backbone(model)
    alone, with_processes = (only(backbone, folder, workers=workers, cache=False) for workers in (0, 2))
    assert np.array_equal(alone.values, with_processes.values)


def test_all_layers_come_from_one_pass(model, folder):
    backbone = open_backbone(model)
    layers = extract(backbone, open_source(folder), Extraction(layers="all", cache=False))
    assert [features.layer for features in layers] == [0, 1, 2, 3]
    for layer, features in enumerate(layers):
        single = only(backbone, folder, layers=(layer,), cache=False)
        np.testing.assert_allclose(features.values, single.values, atol=1e-5)


def test_tokens_are_matrices(model, folder):
    features = only(open_backbone(model), folder, pooling="tokens")
    assert features.values.shape == (12, 16, 96)


def test_unreadable_images_are_left_out_and_reported(model, folder):
    whole = only(open_backbone(model), folder, cache=False)
    (folder / "blue" / "3.png").write_bytes(b"")
    (folder / "red" / "0.png").write_bytes(b"GIF89a")
    features = only(open_backbone(model), folder, batch_size=3, max_bad=0.5)
    kept = [i for i in range(12) if i not in (3, 5)]
    np.testing.assert_allclose(features.values, whole.values[kept], atol=1e-5)
    assert features.labels.tolist() == whole.labels[kept].tolist()
    assert features.locations == [whole.locations[i] for i in kept]
    assert [bad.location for bad in features.bad] == [whole.locations[i] for i in (3, 5)]
    # They are reported every time, so such features are not kept.
    again = only(open_backbone(model), folder, max_bad=0.5)
    assert len(again.bad) == 2


def test_too_many_unreadable_images_are_refused(model, folder):
    for i in range(2):
        (folder / "blue" / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"2 of 12 images of .* cannot be read, more than the limit \(a share of 0\.01\)"
    ):
        only(open_backbone(model), folder)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="None of 12 images can be read"):
        only(open_backbone(model), folder, max_bad=1.0)


def test_features_that_are_not_finite_are_refused_with_the_first_image(folder):
    model = crate_mae.create_model(MODEL)
    with torch.no_grad():
        model.encoder.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"not finite numbers, first for .*blue.0\.png"):
        only(open_backbone(model), folder)


def test_channels_that_cannot_be_converted_are_refused(folder):
    model = crate_mae.create_model(MODEL, in_chans=5)
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            only(open_backbone(model), folder, workers=workers)
        assert str(error.value).startswith("The images have 3 channel(s), but 5 are required.")
        assert "Traceback" not in str(error.value)


def test_grey_and_colour_and_other_sizes_are_converted(folder):
    model = crate_mae.create_model(MODEL, in_chans=1, image_size=(12, 6))
    assert only(open_backbone(model), folder).values.shape == (12, 192)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0, "workers": -1}, "--batch-size is 0.*\n--workers is -1"),
        ({"max_bad": 2.0}, "--max-bad is 2.0"),
        ({"layers": "every"}, '--layer is .every., but must be a whole number or "all"'),
        ({"layers": (9,)}, "There is no layer 9"),
    ],
)
def test_invalid_options_are_named(model, folder, options, words):
    with pytest.raises(UserError, match=words):
        only(open_backbone(model), folder, **options)


def test_features_are_extracted_once(model, folder, calls):
    first = only(open_backbone(model), folder)
    assert calls == [12]
    assert np.array_equal(only(open_backbone(model), folder).values, first.values)
    assert calls == [12]
    only(open_backbone(model), folder, cache=False)
    only(open_backbone(model), folder, pooling="mean")
    assert calls == [12] * 3


def test_changes_that_affect_features_extract_them_again(model, folder, calls):
    only(open_backbone(model), folder)
    path = folder / "blue" / "0.png"
    path.write_bytes((folder / "red" / "0.png").read_bytes())
    os.utime(path, ns=(1, 1))
    changed = only(open_backbone(model), folder)
    assert calls == [12, 12]
    np.testing.assert_allclose(changed.values[0], changed.values[5], atol=1e-5)
    (folder / "red" / "9.png").write_bytes(path.read_bytes())
    assert len(only(open_backbone(model), folder).values) == 13


def test_only_missing_layers_are_extracted(model, folder, monkeypatch):
    backbone = open_backbone(model)
    whole = extract(backbone, open_source(folder), Extraction(layers="all"))
    wanted = []
    forward = type(model.encoder).forward_intermediates

    @functools.wraps(forward)
    def noted(self, x, indices, **options):
        wanted.append(list(indices))
        return forward(self, x, indices, **options)

    monkeypatch.setattr(type(model.encoder), "forward_intermediates", noted)
    cache = FeatureCache(backbone, open_source(folder), "cls+mean")
    cache._path(1).unlink()
    again = extract(backbone, open_source(folder), Extraction(layers="all"))
    assert wanted == [[1]]
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-5)


def test_a_class_that_was_renamed_is_seen(model, folder):
    first = only(open_backbone(model), folder)
    (folder / "blue").rename(folder / "violet")  # after "red"
    renamed = only(open_backbone(model), folder)
    assert renamed.classes == ["red", "violet"]
    assert renamed.labels.tolist() == [0] * 7 + [1] * 5
    np.testing.assert_allclose(renamed.values, first.values[[*range(5, 12), *range(5)]], atol=1e-5)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 2
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"no tensors"), lambda path: os.truncate(path, 99), flip]
)
def test_a_damaged_cache_is_done_without_and_mended(model, folder, calls, own_cache, damage):
    first = only(open_backbone(model), folder)
    (kept,) = (own_cache / "crate-mae" / "features").iterdir()
    damage(kept)
    assert np.array_equal(only(open_backbone(model), folder).values, first.values)
    only(open_backbone(model), folder)
    assert calls == [12, 12]


def test_a_cache_that_cannot_be_written_is_done_without(model, folder, own_cache):
    (own_cache / "crate-mae").mkdir()
    (own_cache / "crate-mae" / "features").write_text("in the way")
    assert len(only(open_backbone(model), folder).values) == 12


@pytest.mark.parametrize("is_full", [True, False])
def test_a_cache_that_fills_up_or_is_deleted_meanwhile_is_done_without(
    model, folder, own_cache, calls, monkeypatch, is_full
):
    save_file = extract_module.save_file

    def interrupted(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.rmtree(own_cache / "crate-mae")

    monkeypatch.setattr(extract_module, "save_file", interrupted)
    first = only(open_backbone(model), folder)
    assert not list(own_cache.rglob("*.safetensors*"))
    monkeypatch.setattr(extract_module, "save_file", save_file)
    assert np.array_equal(only(open_backbone(model), folder).values, first.values)
    assert np.array_equal(only(open_backbone(model), folder).values, first.values)
    assert calls == [12, 12]


def test_the_cache_forgets_what_was_used_longest_ago(model, folder, own_cache, calls, monkeypatch):
    monkeypatch.setattr(extract_module, "MOST_BYTES", 2 * 9500)  # two files of 12 x 192 numbers, not three
    for layer in (0, 1):
        only(open_backbone(model), folder, layers=(layer,))
        newest = max((own_cache / "crate-mae" / "features").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, ns=(layer, layer))
    only(open_backbone(model), folder, layers=(0,))  # used again: now layer 1 is the oldest
    only(open_backbone(model), folder, layers=(2,))
    cache = FeatureCache(open_backbone(model), open_source(folder), "cls+mean")
    assert [cache.read(layer) is not None for layer in range(4)] == [True, False, True, False]


def test_features_of_data_from_python_are_not_cached(model, own_cache):
    images = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert len(only(open_backbone(model), images).values) == 3
    assert not (own_cache / "crate-mae" / "features").exists()
