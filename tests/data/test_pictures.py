import errno

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import save_picture_grid
from crate_mae.data.pictures import picture_grid
from crate_mae.errors import UserError


def opened(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def colours(path):
    return {tuple(colour) for colour in np.asarray(opened(path)).reshape(-1, 3).tolist()}


def test_small_images_are_enlarged_without_smoothing(tmp_path):
    images = torch.zeros(3, 1, 8, 8)
    images[:, :, :, 4:] = 0.2
    save_picture_grid([("", images)], tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == {(255, 255, 255), (0, 0, 0), (51, 51, 51)}
    width, height = opened(tmp_path / "a.png").size
    assert width > 3 * 128
    assert 128 < height < 160


def test_large_images_are_kept(tmp_path):
    save_picture_grid([("", torch.rand(1, 3, 224, 224))], tmp_path / "large.png")
    assert 224 <= opened(tmp_path / "large.png").width < 260


def test_rows_have_names_and_columns_captions(tmp_path):
    images = torch.zeros(2, 3, 16, 16)
    save_picture_grid([("", images), ("", images)], tmp_path / "bare.png")
    save_picture_grid([("original", images), ("b", images)], tmp_path / "named.png", captions=["20 dB", "21 dB"])
    bare, named = opened(tmp_path / "bare.png"), opened(tmp_path / "named.png")
    assert named.width > bare.width + 30
    assert named.height > bare.height
    assert (np.asarray(named)[:, :60] < 128).any(), "the names are drawn in the left margin"


def test_values_outside_the_unit_range_are_clamped(tmp_path):
    images = torch.tensor([-3.0, 9.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    save_picture_grid([("", images)], tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == {(0, 0, 0), (255, 255, 255)}


def test_other_channel_counts_are_shown_as_their_mean(tmp_path):
    images = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.4]).reshape(1, 5, 1, 1).expand(1, 5, 4, 4)
    save_picture_grid([("", images)], tmp_path / "a.png")
    assert (51, 51, 51) in colours(tmp_path / "a.png")


def test_an_unknown_picture_format_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r'"\.txt".*use \.png'):
        save_picture_grid([("", torch.zeros(1, 1, 2, 2))], tmp_path / "a.txt")


def test_a_full_disk_leaves_the_old_picture_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"the old one")

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match=r"Cannot write .*a\.png: no space left on device"):
        save_picture_grid([("", torch.zeros(1, 1, 2, 2))], path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"the old one"


@pytest.mark.parametrize(("form", "suffix"), [("PNG", ".png"), ("BMP", ".bmp")])
def test_the_bytes_of_a_grid_are_those_of_its_file(tmp_path, form, suffix):
    rows = [("a", torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)))]
    save_picture_grid(rows, tmp_path / f"a{suffix}", captions=["x", "y"])
    assert picture_grid(rows, form, captions=["x", "y"]) == (tmp_path / f"a{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".h5", ".xbm"])
def test_a_format_that_cannot_hold_the_picture_is_refused(tmp_path, suffix):
    with pytest.raises(UserError, match=r"Cannot write .*: use \.png|Cannot write .*\. Use \.png"):
        save_picture_grid([("", torch.rand(1, 3, 4, 4))], tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []
