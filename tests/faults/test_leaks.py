"""Images to measure on that are among those learned from are refused, in whatever form both are given."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from crate_mae.data import facts, open_source, refuse_shared_images
from crate_mae.errors import UserError
from crate_mae.training.images import open_images


def noise(*seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def png(*seed):
    file = io.BytesIO()
    noise(*seed).save(file, "png")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """Twelve images in every form, and a copy, a link and a part of the folder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    for i in range(12):
        for folder in ("photos/more" if i % 2 else "photos", "copy"):
            (tmp_path / folder / f"{i:02}.png").write_bytes(png(i))
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    pq.write_table(pa.table({"image": [png(i) for i in range(12)]}), tmp_path / "all.parquet")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i in range(12):
            info = tarfile.TarInfo(f"{i:02}.png")
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    (tmp_path / "other.tar").symlink_to(tmp_path / "all.tar")
    return tmp_path


ITEMS = [(np.asarray(noise(i)), i % 2) for i in range(12)]


@pytest.mark.parametrize(
    ("train", "val"),
    [("photos", "link"), ("photos", "photos/../photos"), ("all.tar", "other.tar"), ("all.parquet", "all.tar"),
     ("copy", "all.parquet")],
)  # fmt: skip
def test_the_same_images_are_recognised(data, train, val):
    with pytest.raises(UserError, match=r"--train and --val are the same images"):
        refuse_shared_images(open_source(data / train), open_source(data / val), "--train", "it is no test")


def test_the_same_images_of_python_and_of_names_are_recognised():
    for train, val in ((ITEMS, ITEMS), (ITEMS, list(ITEMS)), ("digits", "digits")):
        with pytest.raises(UserError, match=r"are the same images"):
            refuse_shared_images(open_source(train), open_source(val), "--train", "it is no test")


@pytest.mark.parametrize(
    ("train", "val", "shared"),
    [("photos", "photos/more", "6 of 6"), ("photos", "link/more/01.png", "1 of 1"),
     ("digits", "digits:test", "297 of 297")],
)  # fmt: skip
def test_a_part_of_the_training_images_is_recognised(data, train, val, shared):
    first, second = (name if name.startswith("digits") else data / name for name in (train, val))
    with pytest.raises(UserError, match=rf"{shared} images of --val .* are also in --train"):
        refuse_shared_images(open_source(first), open_source(second), "--train", "it is no test")


def test_other_images_are_accepted(data, caplog):
    others = [(np.asarray(noise(i, 1)), i % 2) for i in range(12)]
    for train, val in ((ITEMS, others), ("digits:train", "digits:test"), (str(data / "photos"), others)):
        refuse_shared_images(open_source(train), open_source(val), "--train", "it is no test")
    assert "also in" not in caplog.text


@pytest.mark.parametrize("train", ["photos", "all.parquet", "all.tar"])
def test_copies_under_other_names_are_named(data, train, caplog):
    (data / "val").mkdir()
    for i in range(9, 14):
        (data / "val" / f"new {i}.png").write_bytes(png(i))
    sources = open_source(data / train), open_source(data / "val")
    refuse_shared_images(*sources, "--train", "it is no test")
    assert f"3 of 5 images of --val ({data / 'val'}) are also in --train ({data / train}), e.g. " in caplog.text
    assert f"{data / 'val' / 'new 10.png'} = " in caplog.text


def test_copies_among_python_objects_are_named(caplog):
    others = [(np.asarray(noise(i)), 0) for i in (30, 7, 31)]
    refuse_shared_images(open_source(ITEMS), open_source(others), "--train", "it is no test")
    assert "1 of 3 images of --val (list) are also in --train (list), e.g. list[1] = list[7]." in caplog.text


def test_copies_among_files_and_python_objects_are_named(data, caplog):
    for items in ([np.asarray(noise(7))], [noise(7)], [pil_to_tensor(noise(7))]):
        caplog.clear()
        refuse_shared_images(open_source(data / "photos"), open_source(items), "--train", "it is no test")
        assert "1 of 1 images of --val (list) are also in --train" in caplog.text


def test_of_much_data_a_sample_is_searched_and_named(data, caplog, monkeypatch):
    monkeypatch.setattr(facts, "_MOST_COMPARED", 10 * facts._LEAST_COMPARED)
    sources = open_source(data / "photos"), open_source(data / "copy")
    pairs, compared = facts.find_copies(*sources)
    assert compared == (5, 5)
    assert all(sources[0].content(i) == sources[1].content(j) for i, j in pairs)
    monkeypatch.setattr(facts, "_MOST_COMPARED", 1)
    others = [(np.asarray(noise(i, 1)), 0) for i in range(12)]
    refuse_shared_images(open_source(ITEMS), open_source(others), "--train", "it is no test")
    assert "Copies were looked for among 1 of the 12 images of --train and 1 of the 12 of --val" in caplog.text


def test_unreadable_images_are_no_copies(data, caplog):
    for folder in ("photos", "copy"):
        (data / folder / "lost.png").symlink_to("nowhere")
    (data / "copy" / "00.png").write_bytes(png(50))
    for i in range(1, 12):
        (data / "copy" / f"{i:02}.png").unlink()
    refuse_shared_images(open_source(data / "photos"), open_source(data / "copy"), "--train", "it is no test")
    assert "also in" not in caplog.text


@pytest.mark.parametrize("val", ["photos", "link", "photos/more"])
def test_pretraining_is_not_measured_on_its_training_images(data, val):
    with pytest.raises(UserError, match="DATA"):
        open_images(str(data / "photos"), str(data / val))
