"""Copies with smaller images: what is in them, and that they are written whole or not at all."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from crate_mae.cli import main
from crate_mae.commands.data import resize
from crate_mae.data import open_source
from crate_mae.data.base import label_names
from crate_mae.data.resize import lossless_size, resize_images
from crate_mae.data.transforms import pretrain_transform
from crate_mae.errors import UserError


def smooth(height, width, mode="RGB"):
    """An image like a photograph: without noise, which JPEG would change."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 61], axis=-1)
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """Two classes, with files of several formats, sizes and depths."""
    root = tmp_path / "photos"
    for name in ("cat", "dog/deep"):
        (root / name).mkdir(parents=True)
    smooth(60, 90).save(root / "cat/a.jpg")
    smooth(90, 60).save(root / "cat/a.png")
    smooth(20, 90).save(root / "cat/small.webp")
    smooth(70, 70, "RGBA").save(root / "dog/deep/c.png")
    ramp = np.linspace(0, 65535, 60 * 40).reshape(60, 40)
    Image.fromarray(ramp.astype(np.uint16)).save(root / "dog/d.png")
    Image.fromarray(np.float32(ramp / 1000)).save(root / "dog/e.tif")
    Image.fromarray(np.full((5, 7), 65.535, dtype=np.float32)).save(root / "dog/f.tif")
    return root


def copy_of(data, out, size=30, **options):
    assert resize_images(open_source(data), out, size, workers=0, **options) == []
    return open_source(out)


def test_a_folder_keeps_its_layout_and_classes(photos, tmp_path):
    copy = copy_of(photos, tmp_path / "new" / "copy")
    names = ["cat/a.jpg", "cat/a.png", "cat/small.webp", "dog/d.png", "dog/deep/c.png", "dog/e.png", "dog/f.png"]
    assert copy.images == names
    assert label_names(copy) == label_names(open_source(photos))
    sizes = [copy.read(i).size for i in range(len(names))]
    assert sizes == [(45, 30), (30, 45), (90, 20), (30, 45), (30, 30), (30, 45), (7, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "photos"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_labels_of_a_table_are_copied_under_the_new_names(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.bmp", "a.bmp"):
        Image.new("RGB", (30, 20)).save(data / name)
    (data / "metadata.csv").write_text("file_name,label\na.bmp,dog\nb.bmp,cat\n")
    resize_images(open_source(data), tmp_path / "copy", 10, workers=0)
    copy = open_source(tmp_path / "copy")
    assert copy.images == ["a.png", "b.png"]
    assert label_names(copy) == ["dog", "cat"]


def test_pixels_are_those_of_the_resampling_of_training(photos, tmp_path):
    copy, source = copy_of(photos, tmp_path / "copy"), open_source(photos)
    bicubic = v2.Resize(30, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    expected = np.asarray(bicubic(source.read(1)))
    assert np.array_equal(np.asarray(copy.read(1)), expected), "a PNG file stays without loss"
    error = np.asarray(copy.read(0), dtype=float) - np.asarray(bicubic(source.read(0)))
    assert np.sqrt((error**2).mean()) < 2.55, "a JPEG file has at least 40 dB"
    unit = bicubic(torch.from_numpy(np.asarray(source.read(3)) / np.float32(65535))[None])
    deep = np.asarray(copy.read(3))
    assert (deep.dtype, deep.shape) == (np.uint16, (45, 30))
    assert np.abs(deep / 65535 - unit.clamp(0, 1).numpy()[0]).max() < 1e-5


def test_floats_keep_the_range_of_their_source(photos, tmp_path):
    copy = copy_of(photos, tmp_path / "copy")
    assert np.asarray(copy.read(6)).tolist() == [[65535] * 7] * 5, "65.535 is the largest value of all float images"


def test_small_files_are_copied_byte_for_byte(photos, tmp_path):
    copy_of(photos, tmp_path / "copy", size=20)
    assert (tmp_path / "copy/cat/small.webp").read_bytes() == (photos / "cat/small.webp").read_bytes()


def test_names_that_meet_are_kept_apart(tmp_path):
    (tmp_path / "photos").mkdir()
    smooth(40, 40).save(tmp_path / "photos/IMG.webp")
    smooth(40, 50).save(tmp_path / "photos/img.jpg")
    copy = copy_of(tmp_path / "photos", tmp_path / "copy")
    assert [(copy.images[i], copy.read(i).size) for i in (0, 1)] == [("IMG.jpg", (30, 30)), ("img.jpg.jpg", (37, 30))]


def test_orientation_is_applied(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    smooth(40, 80).save(tmp_path / "photos/a.jpg", exif=exif)
    assert copy_of(tmp_path / "photos", tmp_path / "copy").read(0).size == (30, 60)


def test_every_other_source_becomes_a_parquet_file_with_its_labels(tmp_path):
    source, copy = open_source("digits:test"), copy_of("digits:test", tmp_path / "copy", size=5)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["images.parquet"]
    assert np.array_equal(copy.labels, source.labels)
    assert (copy.classes, copy.read(0).size) == (source.classes, (5, 5))
    again = copy_of(tmp_path / "copy", tmp_path / "again", size=5)
    assert np.array_equal(again.labels, source.labels)
    assert [again.content(i) for i in range(9)] == [copy.content(i) for i in range(9)]
    unlabelled = copy_of([torch.rand(3, 9, 9), torch.zeros(1, 9, 9, dtype=torch.uint8)], tmp_path / "items", size=4)
    assert (len(unlabelled), unlabelled.labels) == (2, None)


def test_unreadable_images_are_listed_and_left_out(photos, tmp_path, capsys):
    (photos / "cat/bad.jpg").write_bytes(b"")
    main(["data", "resize", str(photos), str(tmp_path / "copy"), "--size", "30"])
    assert capsys.readouterr().out.splitlines() == [
        f"Left out: {photos / 'cat/bad.jpg'}: the file is empty (0 bytes)",
        f"Saved 7 images in {tmp_path / 'copy'}",
    ]
    limit = r"1 of 8 images .* more than the limit \(a share of 0\)(.|\n)*raise the limit with --max-bad"
    with pytest.raises(UserError, match=limit):
        resize(photos, tmp_path / "strict", size=30, workers=0, max_bad=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "photos"]


def test_if_nothing_can_be_read_nothing_is_written(make_folder, tmp_path):
    root = make_folder({"a.png": 1})
    (root / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"None of 1 images can be read.*\n.*a\.png"):
        resize(root, tmp_path / "copy", size=3, workers=0, max_bad=1)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("existing", ["a folder", "a file", "a lost link", "the source"])
def test_nothing_that_exists_is_replaced(photos, tmp_path, existing):
    out = photos if existing == "the source" else tmp_path / "copy"
    if existing == "a folder":
        out.mkdir()
    elif existing == "a file":
        out.write_text("precious")
    elif existing == "a lost link":
        out.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        resize(photos, out, size=30, workers=0)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_copy_is_not_made_among_its_images(photos, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    for out in (photos / "small", tmp_path / "link" / "cat" / "small"):
        with pytest.raises(UserError, match="lies in the folder of the images"):
            resize(photos, out, size=30, workers=0)


def at_write(monkeypatch, number, act):
    """Have something happen when file `number` of a copy is written."""
    usual, written = Path.write_bytes, []

    def write(path, content):
        written.append(path)
        if len(written) == number:
            act(path)
        return usual(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_leaves_nothing(photos, tmp_path, monkeypatch):
    def fill(_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_write(monkeypatch, 4, fill)
    with pytest.raises(UserError, match=rf"Cannot write {tmp_path / 'copy'}: no space left on device\."):
        resize(photos, tmp_path / "copy", size=30, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_copy_that_is_deleted_meanwhile_is_not_made(photos, tmp_path, monkeypatch):
    def delete(path):
        shutil.rmtree(path.parents[1])
        path.parent.mkdir(parents=True)  # as a copy in another process does for its next file

    at_write(monkeypatch, 3, delete)
    with pytest.raises(UserError, match="Files were removed from"):
        resize(photos, tmp_path / "copy", size=30, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_of_two_at_once_the_first_stays(photos, tmp_path, monkeypatch):
    def another(_path):
        monkeypatch.undo()
        resize(photos, tmp_path / "copy", size=10, workers=0)

    at_write(monkeypatch, 3, another)
    with pytest.raises(UserError, match=r"Cannot write .*copy: something else has taken that name meanwhile"):
        resize(photos, tmp_path / "copy", size=30, workers=0)
    assert open_source(tmp_path / "copy").read(0).size == (15, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "photos"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"size": 0}, "--size is 0"), ({"size": 9, "workers": -1}, "--workers"), ({"size": 9, "max_bad": 2}, "--max-bad")],
)
def test_options_out_of_range_are_sentences(photos, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        resize(photos, tmp_path / "copy", **options)


def test_images_of_other_numbers_of_channels_cannot_be_files(tmp_path):
    with pytest.raises(UserError, match="Images of 5 channels cannot be written"):
        resize_images(open_source([torch.rand(5, 9, 9)]), tmp_path / "copy", 4, workers=0)


@pytest.mark.parametrize(("image_size", "min_crop"), [((13, 13), 0.2), ((11, 23), 0.5), ((29, 7), 1.0)])
def test_no_crop_of_a_copy_is_enlarged(image_size, min_crop):
    side = lossless_size(image_size, min_crop)
    crop = pretrain_transform(image_size, 1, (0.5,), (0.5,), min_crop).resize.transforms[0]
    image = torch.zeros(1, side, side)
    taken = []
    for seed in range(300):
        torch.manual_seed(seed)
        params = crop.make_params([image])
        taken.append((params["height"], params["width"]))
    heights, widths = zip(*taken, strict=True)
    # Rounded to whole pixels; a crop that does not fit into the image is the largest that does.
    assert min(heights) >= image_size[0] - 1
    assert min(widths) >= image_size[1] - 1
    if min_crop == 0.2:
        assert min(heights) <= 1.15 * image_size[0], "a much smaller copy would have to be enlarged"


def test_a_copy_is_read_by_processes_in_the_same_order(tmp_path):
    copies = [copy_of("digits:test", tmp_path / "0", size=5)]
    resize_images(open_source("digits:test"), tmp_path / "2", 5, workers=2)
    copies.append(open_source(tmp_path / "2"))
    assert [copies[0].content(i) for i in range(297)] == [copies[1].content(i) for i in range(297)]
