import csv
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cyclopts import App
from PIL import Image

from crate_mae.cli import main
from crate_mae.commands.data import check as check_command
from crate_mae.data import (
    DataReport,
    ImageFacts,
    channel_statistics,
    check,
    describe_images,
    open_source,
    suggest_model,
)
from crate_mae.data import facts as facts_module
from crate_mae.data.base import evenly_spaced_first
from crate_mae.errors import UserError
from crate_mae.models.presets import preset


def test_sizes_are_medians_and_channels_follow_the_colour_images():
    images = [Image.new("L", (5, 11)), Image.new("RGB", (7, 13)), Image.new("L", (29, 31))]
    assert describe_images(open_source(images)) == ImageFacts(3, 13, 7)
    assert describe_images(open_source(images[:1])).channels == 1
    assert describe_images(open_source([torch.zeros(5, 3, 2)])).channels == 5


def test_unreadable_images_are_left_out(make_folder):
    root = make_folder({"a.png": 1, "b.png": 2, "c.png": 3})
    (root / "b.png").write_bytes(b"")
    assert describe_images(open_source(root)) == ImageFacts(3, 5, 7)
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"None of 3 images .*\n.*a\.png: the file is empty"):
        describe_images(open_source(root))


def test_the_sample_is_fixed_and_has_the_requested_size(monkeypatch):
    source = open_source("digits")
    read, plain_read = [], source.read
    monkeypatch.setattr(source, "read", lambda i: read.append(i) or plain_read(i))
    assert describe_images(source, 5) == describe_images(source, 5) == ImageFacts(1, 8, 8)
    assert len(read) == 10 and read[:5] == read[5:]


def test_statistics_are_those_of_all_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3, 3), dtype=np.uint8)
    mean, std = channel_statistics(open_source([Image.fromarray(image) for image in pixels]), 3)
    unit = pixels.reshape(-1, 3) / 255
    assert mean == pytest.approx(unit.mean(0), abs=1e-12)
    assert std == pytest.approx(unit.std(0), abs=1e-12)


def test_statistics_of_tensors_and_pictures_agree():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 7), dtype=np.uint8)
    pictures = channel_statistics(open_source([Image.fromarray(image) for image in pixels]), 1)
    for tensors in ([torch.from_numpy(image) for image in pixels], [torch.from_numpy(image) / 255 for image in pixels]):
        assert np.allclose(channel_statistics(open_source(tensors), 1), pictures, atol=1e-6)


def test_a_constant_channel_can_still_be_divided_by():
    assert channel_statistics(open_source([Image.new("L", (3, 2), 51)]), 1) == ((0.2,), (1 / 255,))


def test_statistics_do_not_need_readable_images_in_the_first_sample(make_folder, monkeypatch):
    root = make_folder({f"{i}.png": 51 for i in range(5)})
    monkeypatch.setattr(facts_module, "_PROBE", 1)
    (bad,) = facts_module.fixed_sample(5, 1)
    (root / f"{bad}.png").write_bytes(b"")
    assert channel_statistics(open_source(root), 1)[0] == pytest.approx([0.2])


def test_statistics_of_images_that_cannot_be_read_are_refused_with_the_first_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"No image of .* can be read. The first is\n.*a.png: "):
        channel_statistics(open_source(tmp_path), 1)


def test_fewer_large_images_are_read_for_the_statistics(monkeypatch):
    monkeypatch.setattr(facts_module, "_MOST_PIXELS", 17 * 64)
    read = []
    source = open_source("digits")
    plain_read = source.read
    monkeypatch.setattr(source, "read", lambda i: read.append(i) or plain_read(i))
    channel_statistics(source, 1)
    assert len(read) == 16 + 17


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(12, 40, 8), (44, 48, 32), (48, 49, 64), (96, 128, 96), (128, 128, 128), (500, 177, 224)],
)
def test_the_suggested_model_follows_the_shorter_side(height, width, size):
    name, found = suggest_model(ImageFacts(3, height, width))
    assert found == size
    assert preset(name).image_size == (size, size)
    assert 16 <= math.prod(preset(name).grid_size) <= 256


@pytest.mark.parametrize(
    ("image_size", "patch"),
    [(8, 2), (16, 4), (32, 4), (48, 8), (60, 12), (64, 8), (112, 16), (128, 16), ((64, 128), 8), (224, 16), (384, 16)],
)
def test_for_a_size_that_is_asked_for_the_suggested_model_has_patches_that_divide_it(image_size, patch):
    name, _ = suggest_model(ImageFacts(3, 200, 200), image_size)
    assert preset(name).replace(image_size=image_size).patch_size == patch


def test_a_size_that_no_suggestion_divides_is_left_to_the_nearest():
    assert suggest_model(None, 101) == ("crate_mae_micro_wide_monotone_patch12_96", 96)


@pytest.fixture
def flawed(make_folder, noisy, encoded):
    """Two classes; one truncated and one empty file, one pair of equal files."""
    root = make_folder({"cat/1.png": 1, "cat/2.png": 2, "dog/1.png": 1, "dog/2.png": 9, "dog/3.png": 5, "dog/4.png": 6})
    (root / "dog/2.png").write_bytes(noisy(0)[:500])
    (root / "dog/3.png").write_bytes(b"")
    (root / "dog/4.png").write_bytes(encoded(7, form="JPEG", size=(16, 12), mode="L"))
    return root


def test_a_check_finds_what_is_there_and_what_is_wrong(flawed):
    seen = []
    report = check(open_source(flawed), on_image=lambda: seen.append(1))
    assert (report.images, report.checked, len(seen)) == (6, 6, 6)
    assert report.classes == {"cat": 2, "dog": 4}
    assert (report.heights, report.widths) == ((5, 5, 12), (7, 7, 16))
    assert (report.modes, report.formats) == ({"RGB": 3, "L": 1}, {"PNG": 3, "JPEG": 1})
    assert [bad.location[-9:] for bad in report.bad] == ["dog/2.png", "dog/3.png"]
    assert [[place[-9:] for place in group] for group in report.duplicates] == [["cat/1.png", "dog/1.png"]]
    assert (report.channels, report.suggested_model) == (3, "crate_mae_nano_isometric_patch2_8")
    assert report.mean == pytest.approx([(1 + 2 + 1 + 7) / 4 / 255] * 3)


def test_equal_pixels_of_a_data_set_are_duplicates():
    report = check(open_source([torch.zeros(2, 3, 3), torch.ones(2, 3, 3), torch.zeros(2, 3, 3)]))
    assert report.duplicates == (("list[0]", "list[2]"),)
    assert report.modes == {"2 x float32": 3}


def test_a_check_of_nothing_readable_still_reports(make_folder):
    root = make_folder({"a.png": 1})
    (root / "a.png").write_bytes(b"x")
    report = check_command(str(root))
    assert (len(report.bad), report.heights, report.mean, report.suggested_model) == (1, (), (), None)


def test_the_command_prints_a_table_and_lists_bad_files(flawed, tmp_path, capsys):
    report = check_command(str(flawed), out=tmp_path / "bad.csv")
    printed = capsys.readouterr().out
    for words in (
        "cat 2, dog 4",
        "5 to 12, median 5",
        "crate_mae_nano_isometric_patch2_8",
        "2 unreadable and 1 duplicate images",
    ):
        assert words in printed
    rows = list(csv.reader((tmp_path / "bad.csv").read_text(encoding="utf-8").splitlines()))
    copy = [str(flawed / "dog/1.png"), f"duplicate of {flawed / 'cat/1.png'}"]
    assert rows == [["location", "reason"], *(list(bad) for bad in report.bad), copy]


def test_the_command_prints_what_is_not_read_and_the_range_of_deep_images(tmp_path, capsys):
    Image.fromarray(np.array([[0, 300]], dtype=np.float32)).save(tmp_path / "a.tif")
    (tmp_path / "b.jxl").touch()
    (tmp_path / "c").touch()
    check_command(str(tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert "values of F 0 to 300 become 0 to 1" in printed
    assert "not read 2 files are not read: 1 .jxl, 1 without a suffix" in printed


def test_unusual_ranges_of_values_and_grey_colour_images_have_a_line_each(tmp_path, capsys):
    deep = np.array([[3, 4095]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30), (7, 7, 7)).save(tmp_path / "b.png")
    coloured = Image.new("RGB", (40, 30), (7, 7, 7))
    coloured.putpixel((39, 29), (7, 8, 7))
    coloured.save(tmp_path / "c.png")
    report = check_command(str(tmp_path))
    assert (report.values, report.grey_colour) == ({"I;16": (3, 4095), "RGB": (7, 8)}, 1)
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("values of I;16 3 to 4,095 of 65,535: 12 of 16 bits are used", "values of RGB 7 to 8 of 255: 4 of 8",
                  "grey as colour 1 of 3 images"):  # fmt: skip
        assert words in printed


def test_usual_values_have_no_line(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert check_command(str(tmp_path)).grey_colour == 0
    assert not {"values", "grey"} & set(capsys.readouterr().out.split())


def test_the_command_prints_json_and_nothing_else(flawed, tmp_path, capsys):
    main(["data", "check", str(flawed), "--json", "--out", str(tmp_path / "bad.csv")])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert (out.isascii(), set(found)) == (True, {field.name for field in dataclasses.fields(DataReport)})
    assert (found["images"], found["classes"], found["values"]["RGB"]) == (6, {"cat": 2, "dog": 4}, [1, 2])
    assert [bad["location"] for bad in found["bad"]] == [str(flawed / "dog/2.png"), str(flawed / "dog/3.png")]
    assert found["duplicates"] == [[str(flawed / "cat/1.png"), str(flawed / "dog/1.png")]]
    assert (tmp_path / "bad.csv").is_file()


def test_the_command_prints_names_that_look_like_markup(make_folder, capsys):
    root = make_folder({"[red]/a.png": 1, "b[bold]/a.png": 2})
    (root / "[red]/a.png").write_bytes(b"")
    check_command(str(root))
    assert "[red] 1, b[bold] 1" in capsys.readouterr().out


def test_the_command_does_not_overwrite_files(flawed, tmp_path):
    (tmp_path / "bad.csv").write_text("precious")
    with pytest.raises(UserError, match="is not overwritten"):
        check_command(str(flawed), out=tmp_path / "bad.csv")
    assert (tmp_path / "bad.csv").read_text() == "precious"


def test_the_command_line_understands_the_command(flawed, capsys):
    app = App(result_action="return_value")
    app.command(check_command)
    report = app(["check", str(flawed), "--sample", "2"], exit_on_error=False)
    assert (report.checked, report.images) == (2, 6)
    assert "6, of which 2 were read" in capsys.readouterr().out


def test_the_command_is_defined_without_loading_torch():
    code = "import sys, crate_mae.commands.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_of_spread_numbers_are_evenly_spaced_and_none_is_missing():
    assert [*evenly_spaced_first(10, 3)] == [0, 3, 6, 1, 2, 4, 5, 7, 8, 9]
    assert [*evenly_spaced_first(3, 3)] == [*evenly_spaced_first(3, 8)] == [0, 1, 2]
