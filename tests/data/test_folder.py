import os

import pytest
from PIL import Image

from crate_mae.data import decode, open_source
from crate_mae.errors import UserError


def test_a_flat_folder_is_read_in_the_order_of_names_without_labels(make_folder, level_of):
    source = open_source(make_folder({"c.png": 30, "a.png": 10, "b.PNG": 20}))
    assert [level_of(source, i) for i in range(len(source))] == [10, 20, 30]
    assert source.labels is None
    assert source.label(0) == -1


def test_class_folders_give_labels_in_sorted_order(make_folder):
    source = open_source(make_folder({"dog/2.png": 1, "cat/deep/1.png": 2, "dog/1.png": 3}))
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1]


def test_labels_are_read_from_the_metadata_of_an_imagefolder(make_folder):
    root = make_folder({"b.png": 1, "a/1.png": 2})
    (root / "metadata.csv").write_text("file_name,label,text\nb.png,dog,x\na/1.png,cat,y\ngone.png,cat,z\n")
    source = open_source(root)
    assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, 1])
    before = source.fingerprint()
    (root / "metadata.csv").write_text("file_name,label\nb.png,cat\na/1.png,dog\n")
    assert open_source(root).labels.tolist() == [1, 0]
    assert open_source(root).fingerprint() != before
    assert open_source(root / "b.png").labels is None


def test_a_label_may_have_any_letter(make_folder):
    root = make_folder({"b.png": 1, "a.png": 2})
    (root / "metadata.csv").write_text("file_name,label\nb.png,do\u2028g\na.png,cat\n", encoding="utf-8")
    assert open_source(root).classes == ["cat", "do\u2028g"]


def test_labels_are_read_from_the_annotations_of_tiny_imagenet(make_folder):
    root = make_folder({"images/val_0.JPEG": 1, "images/val_1.JPEG": 2})
    (root / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n")
    source = open_source(root)
    assert (source.classes, source.labels.tolist()) == (["n01", "n03"], [1, 0])


def test_metadata_without_labels_and_beside_class_folders_is_ignored(make_folder):
    root = make_folder({"cat/1.png": 1, "dog/1.png": 2})
    (root / "metadata.csv").write_text("file_name,label\n")
    assert open_source(root).classes == ["cat", "dog"]
    flat = make_folder({"1.png": 1}, name="flat")
    (flat / "metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    assert open_source(flat).labels is None


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (b"file_name,label\n1.png,cat\n", r"no label for 2\.png \(1 of 2 images have none\)"),
        (b"file_name,label\n1.png,cat\n2.png,\n", r"no label for 2\.png"),
        (b"file_name,label\n1.png,\xff\n", "is not a table of text in UTF-8"),
    ],
    ids=["a line is missing", "a label is empty", "bytes"],
)
def test_a_table_that_lacks_labels_is_refused(table, fault, make_folder):
    root = make_folder({"1.png": 1, "2.png": 2})
    (root / "metadata.csv").write_bytes(table)
    with pytest.raises(UserError, match=fault):
        open_source(root)


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


def test_files_are_read_by_every_suffix_of_their_format(tmp_path, level_of):
    """Windows saves JPEG as .jfif, stereo cameras as .mpo, and netpbm's tools name their files in five ways."""
    Image.init()
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in {*decode.FORMATS, "MPO"}}
    assert known <= set(decode.SUFFIXES)
    for name, form in (("0.jfif", "JPEG"), ("1.JFIF", "JPEG"), ("2.jpe", "JPEG"), ("3.apng", "PNG"), ("4.pnm", "PPM")):
        Image.new("L", (8, 8), 40).save(tmp_path / name, form)
    source = open_source(tmp_path)
    assert [level_of(source, i) for i in range(len(source))] == [40] * 5
    assert not source.left_out
    assert level_of(open_source(tmp_path / "0.jfif"), 0) == 40


def test_a_single_image_file_is_a_source_of_one(make_folder, level_of):
    source = open_source(make_folder({"a.png": 77, "b.png": 1}) / "a.png")
    assert (len(source), level_of(source, 0)) == (1, 77)


def test_a_folder_without_images_lists_its_other_files(tmp_path):
    for name in ("1.txt", "2.txt", "deep/3.TXT", "4.pdf", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"Found 0 images under .*looked for \.jpg \.jpeg .*: 1 \.pdf, 3 \.txt, 1 without a suffix\."
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
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"Cannot read the folder .*images: permission denied"):
        open_source(root)
