import os
import time

import pytest

from crate_mae.data import folder as folder_module
from crate_mae.data import open_source
from crate_mae.errors import UserError


def age(root, seconds=60):
    """Make every folder look as if it had last changed some time ago, so that its listing may be cached."""
    then = time.time_ns() - seconds * 10**9
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(folder, ns=(then, then))


@pytest.fixture
def scans(monkeypatch):
    """How often a folder was really listed."""
    counted = []
    scan = folder_module._scan
    monkeypatch.setattr(folder_module, "_scan", lambda root: counted.append(root) or scan(root))
    return counted


def test_a_flat_folder_is_read_in_the_order_of_names_without_labels(make_folder, level_of):
    source = open_source(make_folder({"c.png": 30, "a.png": 10, "b.PNG": 20}))
    assert [level_of(source, i) for i in range(len(source))] == [10, 20, 30]
    assert source.labels is None
    assert source.label(0) == -1


def test_class_folders_give_labels_in_sorted_order(make_folder):
    source = open_source(make_folder({"dog/2.png": 1, "cat/deep/1.png": 2, "dog/1.png": 3}))
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "names",
    [("cat/1.png", "top.png"), ("cat/1.png", "cat/2.png"), ("train/1.png", "val/1.png")],
    ids=["one at the top", "one folder", "split names"],
)
def test_folders_that_are_not_classes_give_no_labels(make_folder, names):
    assert open_source(make_folder(dict.fromkeys(names, 1))).labels is None


def test_unicode_names_are_read_and_named(make_folder, level_of):
    source = open_source(str(make_folder({"Ünï код/猫 🐈.png": 42}, name="bilder ä")))
    assert level_of(source, 0) == 42
    assert source.location(0).endswith("bilder ä/Ünï код/猫 🐈.png")


def test_a_name_that_is_not_unicode_is_read_and_can_be_printed(make_folder, level_of):
    root = make_folder({"a.png": 1})
    (root / "a.png").rename(os.fsdecode(os.fsencode(root) + b"/\xff.png"))
    source = open_source(root)
    assert level_of(source, 0) == 1
    source.location(0).encode("utf-8")


def test_hidden_and_appledouble_files_are_skipped(make_folder):
    source = open_source(make_folder({"a.png": 1, "._a.png": 2, ".hidden/b.png": 3}))
    assert len(source) == 1


def test_links_are_followed_but_loops_are_not(make_folder):
    root = make_folder({"in/a.png": 1})
    outside = make_folder({"b.png": 2}, name="outside")
    (root / "in" / "loop").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    (root / "linked").symlink_to(outside, target_is_directory=True)
    assert len(open_source(root)) == 2


def test_a_single_image_file_is_a_source_of_one(make_folder, level_of):
    source = open_source(make_folder({"a.png": 77, "b.png": 1}) / "a.png")
    assert (len(source), level_of(source, 0)) == (1, 77)


def test_an_unchanged_folder_is_listed_once(make_folder, scans, own_cache):
    root = make_folder({"x/a.png": 1, "y/b.png": 2})
    age(root)
    first, second = open_source(root), open_source(root)
    assert len(scans) == 1
    assert [first.location(i) for i in range(2)] == [second.location(i) for i in range(2)]
    assert len(list((own_cache / "crate-mae" / "folders").iterdir())) == 1


@pytest.mark.parametrize("change", ["add", "remove", "new folder"])
def test_a_changed_folder_is_listed_again(make_folder, encoded, scans, change):
    root = make_folder({"x/a.png": 1, "x/b.png": 2})
    age(root)
    open_source(root)
    if change == "add":
        (root / "x" / "c.png").write_bytes(encoded(3))
    elif change == "remove":
        (root / "x" / "b.png").unlink()
    else:
        (root / "z").mkdir()
        (root / "z" / "c.png").write_bytes(encoded(3))
    assert len(open_source(root)) == (1 if change == "remove" else 3)
    assert len(scans) == 2


def test_a_folder_that_changed_just_now_is_not_cached(make_folder, scans):
    root = make_folder({"a.png": 1})
    open_source(root)
    open_source(root)
    assert len(scans) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": 1, "root": "elsewhere"}'])
def test_a_damaged_cache_is_ignored(make_folder, own_cache, content):
    root = make_folder({"a.png": 1})
    age(root)
    open_source(root)
    (cache,) = (own_cache / "crate-mae" / "folders").iterdir()
    cache.write_bytes(content)
    assert len(open_source(root)) == 1


def test_a_cache_that_cannot_be_written_is_ignored(make_folder, own_cache):
    (own_cache / "crate-mae").write_text("a file where the folder should be")
    root = make_folder({"a.png": 1})
    age(root)
    assert len(open_source(root)) == 1


def test_a_folder_without_images_lists_its_other_files(tmp_path):
    for name in ("1.txt", "2.txt", "deep/3.TXT", "4.pdf", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"Found 0 images under .*looked for \.jpg \.jpeg .*saw 3 \.txt, 1 without a suffix, 1 \.pdf\."
    ):
        open_source(tmp_path)


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"Found 0 images .* saw no files at all"):
        open_source(tmp_path)


def test_a_forbidden_folder_is_named(make_folder):
    root = make_folder({"in/a.png": 1})
    (root / "in").chmod(0)
    try:
        if os.access(root / "in", os.R_OK):
            pytest.skip("root may read everything")
        with pytest.raises(UserError, match=r"Cannot read the folder .*in: permission denied"):
            open_source(root)
    finally:
        (root / "in").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_named(make_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    root = make_folder({"a.png": 1})
    monkeypatch.setattr(folder_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"Cannot read the folder .*images: permission denied"):
        open_source(root)
