"""Folders that other programs, other systems and other people made."""

import os
import subprocess

import pytest
from PIL import Image

from crate_mae.commands.train import pretrain
from crate_mae.data import decode, full_name, open_source
from crate_mae.data.facts import check
from crate_mae.errors import UserError


def fill(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path, "PNG")
    return folder


def names_of(source):
    return [os.path.basename(source.location(i)) for i in range(len(source))]  # noqa: PTH119


def test_a_folder_is_listed_whatever_its_time(tmp_path):
    data = fill(tmp_path / "data", ["a.png", "b.png"])
    other = fill(tmp_path / "other", ["c.png", "d.png", "e.png"])
    for folder in (data, other):
        os.utime(folder, (0, 0))
    assert names_of(open_source(data)) == ["a.png", "b.png"]
    (data / "b.png").rename(data / "z.png")
    os.utime(data, (0, 0))
    assert names_of(open_source(data)) == ["a.png", "z.png"]
    data.rename(tmp_path / "away")
    other.rename(data)
    assert names_of(open_source(data)) == ["c.png", "d.png", "e.png"]


def test_a_fingerprint_does_not_trust_times(tmp_path):
    seen = set()
    for number in range(3):
        path = fill(tmp_path / str(number), ["a.bmp"]) / "a.bmp"
        Image.new("L", (100, 100), number).save(path, "BMP")
        if number == 2:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(bytes(content))
        os.utime(path, (7, 7))
        seen.add(open_source(path.parent).fingerprint())
    assert len(seen) == 3


def test_a_copy_and_a_link_have_the_fingerprint_of_the_original(tmp_path):
    for name in ("a", "b"):
        os.utime(fill(tmp_path / name, ["x.png"]) / "x.png", (7, 7))
    (tmp_path / "link").symlink_to("a")
    found = {open_source(tmp_path / name).fingerprint() for name in ("a", "b", "link")}
    assert len(found) == 1


@pytest.mark.parametrize("name", ["@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"])
def test_folders_of_systems_are_no_classes(tmp_path, name):
    source = open_source(fill(tmp_path, ["cat/a.png", "dog/b.png", f"{name}/c.png", f"cat/{name}/d.png"]))
    assert source.classes == ["cat", "dog"]
    assert len(source) == 2
    assert check(source).left_out == {f"{name}/": 2}


@pytest.fixture
def readable(monkeypatch):
    """`readable("AVIF")`: only these of the optional formats are read."""
    return lambda *forms: monkeypatch.setattr(decode, "optional_formats", lambda: forms)


def test_files_that_are_not_read_are_counted_and_likely_images_are_named(tmp_path, caplog, readable):
    readable()
    fill(tmp_path, ["a.png", "b.jxl", "c.avif", "d.AVIF", "e.heic", "f.cr2", "notes.txt", "README"])
    report = check(open_source(tmp_path))
    assert report.left_out == {".avif": 2, "": 1, ".cr2": 1, ".heic": 1, ".jxl": 1, ".txt": 1}
    images = "2 .avif (pip install --upgrade pillow), 1 .cr2, 1 .heic (pip install pillow-heif), 1 .jxl"
    assert f"5 files are not read: {images}." in caplog.text
    assert decode.describe_unread(report.left_out) == f"7 files are not read: {images}, 1 without a suffix, 1 .txt"
    assert decode.describe_unread({".txt": 1, "@eaDir/": 3}).endswith("folders of the system are not read: 3 @eaDir/")


def test_formats_that_are_read_here_are_not_named(tmp_path, caplog, readable):
    readable("AVIF", "HEIF")
    source = open_source(fill(tmp_path, ["a.png", "b.avif", "c.HEIC", "d.hif"]))
    assert (len(source), source.left_out, caplog.text) == (4, {}, "")


def test_a_folder_of_files_that_are_not_read_is_an_error_that_names_them(tmp_path, readable):
    readable()
    fill(tmp_path, ["a.cr2", "b.CR2", "c.heic"])
    with pytest.raises(UserError, match=r"Found 0 images.* 2 \.cr2, 1 \.heic \(pip install pillow-heif\)\."):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"c\.heic is a file of the format HEIF, .*pip install pillow-heif"):
        open_source(tmp_path / "c.heic")


def test_a_plan_names_what_is_not_read(tmp_path, readable, capsys):
    readable()
    fill(tmp_path / "data", ["a.png", "b.png", "c.png", "d.heic", "e.nef"])
    pretrain(
        tmp_path / "data",
        out=tmp_path / "run",
        steps=1,
        batch_size=1,
        model="crate_mae_nano_patch2_8",
        precision="float32",
        dry_run=True,
    )
    out = capsys.readouterr().out
    assert "not read       2 files are not read: 1 .heic (pip install pillow-heif), 1 .nef" in out


@pytest.mark.parametrize(("name", "levels"), [("d", 1050), ("d" * 200, 25)])
def test_nested_folders_are_read_or_named(tmp_path, name, levels):
    above = os.open(tmp_path, os.O_RDONLY)  # level by level, since the whole path is longer than a call may take
    for _ in range(levels):
        os.mkdir(name, dir_fd=above)
        below = os.open(name, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=above))
    os.close(above)
    try:
        if name == "d":
            assert len(open_source(tmp_path)) == 1
        else:
            with pytest.raises(UserError, match=r"Cannot read the folder .*\.\.\..*: file name too long"):
                open_source(tmp_path)
    finally:  # Python's own way to remove them ends at a thousand levels
        subprocess.run(["rm", "-rf", tmp_path], check=True)


def test_names_that_are_no_unicode_become_text(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"b"):
        os.makedirs(root + b"/" + name)  # noqa: PTH103
        with open(root + b"/" + name + b"/\xff.png", "wb") as file:  # noqa: PTH123
            Image.new("L", (8, 8)).save(file, "PNG")
    source = open_source(tmp_path)
    assert source.classes == ["b", "caf\\udce9"]
    assert source.read(1).size == (8, 8)
    for text in (source.name, source.location(1), *source.classes):
        text.encode()


@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "{0..9999}{0..9999}.tar", "{0.." + "9" * 100 + "}.tar"])
def test_patterns_that_stand_for_too_many_files_are_refused(pattern):
    with pytest.raises(UserError, match=r"stands for more than 1,000,000 files"):
        open_source(pattern)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png", "x" * 300 + ".tar", "/".join("d" * 3000)])
def test_names_that_no_file_can_have_are_sentences(name):
    for call in (open_source, full_name):
        with pytest.raises(UserError, match=r"file name too long|embedded null byte"):
            call(name)
