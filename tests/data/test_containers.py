import io
import json
import pickle
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crate_mae.data import UnreadableImage, open_source
from crate_mae.data import parquet as parquet_module
from crate_mae.errors import UserError


def write_parquet(path, contents, *, labels=None, struct=True, features=None, rows_per_group=2, column="image"):
    images = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)] if struct else contents
    table = pa.table({column: images} | ({"label": labels} if labels is not None else {}))
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("struct", [True, False], ids=["struct", "binary"])
def test_parquet_rows_are_read_in_any_order(tmp_path, encoded, level_of, struct):
    path = write_parquet(tmp_path / "a.parquet", [encoded(10 * i) for i in range(5)], struct=struct)
    source = open_source(path)
    assert [level_of(source, i) for i in (4, 0, 3, 1, 2)] == [40, 0, 30, 10, 20]
    assert source.labels is None


def test_parquet_labels_and_class_names_come_from_the_schema(tmp_path, encoded):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}
    path = write_parquet(tmp_path / "a.parquet", [encoded(1)] * 3, labels=[2, 0, 2], features=features)
    source = open_source(str(path))
    assert source.labels.tolist() == [2, 0, 2]
    assert source.classes == ["cat", "dog", "emu"]


def test_parquet_labels_may_be_names_or_missing(tmp_path, encoded):
    named = open_source(write_parquet(tmp_path / "a.parquet", [encoded(1)] * 3, labels=["b", "a", "b"]))
    assert (named.labels.tolist(), named.classes) == ([1, 0, 1], ["a", "b"])
    assert open_source(write_parquet(tmp_path / "b.parquet", [encoded(1)] * 2, labels=[1, None])).labels is None


def test_a_folder_of_parquet_files_is_one_source_that_names_file_and_row(tmp_path, encoded, level_of):
    for number in range(2):
        contents = [encoded(100 * number + i) for i in range(3)]
        write_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", contents)
    source = open_source(tmp_path)
    assert [level_of(source, i) for i in range(6)] == [0, 1, 2, 100, 101, 102]
    assert source.location(5).endswith("data/train-00001-of-00002.parquet row 2")


def test_a_parquet_folder_with_splits_is_its_training_part(tmp_path, encoded, level_of):
    write_parquet(tmp_path / "test-0.parquet", [encoded(1)])
    write_parquet(tmp_path / "train-0.parquet", [encoded(2), encoded(3)])
    assert [level_of(open_source(tmp_path), i) for i in range(2)] == [2, 3]
    assert level_of(open_source(str(tmp_path / "test-*.parquet")), 0) == 1


def test_parquet_files_in_folders_of_splits_are_their_training_part(tmp_path, encoded, level_of):
    for part, level in (("test", 1), ("train", 2)):
        (tmp_path / part).mkdir()
        write_parquet(tmp_path / part / "0000.parquet", [encoded(level)])
    source = open_source(tmp_path)
    assert [level_of(source, i) for i in range(len(source))] == [2]


def test_a_pattern_that_is_none_is_refused(tmp_path):
    if sys.version_info >= (3, 13):
        pytest.skip("Python 3.13 takes ** for * there")
    with pytest.raises(UserError, match="is not a valid pattern"):
        open_source(str(tmp_path / "**.tar"))


def test_the_parquet_cache_is_bounded_and_pickles_empty(tmp_path, encoded, level_of, monkeypatch):
    monkeypatch.setattr(parquet_module, "_CACHE_BYTES", 1)
    source = open_source(write_parquet(tmp_path / "a.parquet", [encoded(i) for i in range(5)]))
    assert [level_of(source, i) for i in (0, 4, 1)] == [0, 4, 1]
    assert len(source._cache) == 1
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._cache
    assert level_of(copy, 3) == 3


def test_a_parquet_row_without_bytes_is_unreadable(tmp_path, encoded):
    source = open_source(write_parquet(tmp_path / "a.parquet", [encoded(1), None]))
    with pytest.raises(UnreadableImage, match=r"a\.parquet row 1: the row holds no image bytes"):
        source.read(1)


def test_a_parquet_file_without_images_names_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column of encoded images.*\n.*text \(string\), label \(int64\)"):
        open_source(tmp_path / "a.parquet")


def test_a_damaged_or_empty_parquet_file_is_a_clear_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(UserError, match=r"Cannot read .*a\.parquet as a parquet file"):
        open_source(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="has no rows"):
        open_source(tmp_path / "b.parquet")


def test_real_cifar_is_read_with_its_class_names(shared):
    source = open_source(shared / "data" / "cifar10" / "test.parquet")
    assert len(source) == 10_000
    assert source.classes[0] == "airplane"
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.read(9_999).size == (32, 32)


def test_shard_members_are_read_in_any_order_with_their_labels(tmp_path, encoded, level_of):
    members = {f"{i:03}.png": encoded(i) for i in range(3)} | {f"{i:03}.cls": str(i % 2).encode() for i in range(3)}
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert [level_of(source, i) for i in (2, 0, 1)] == [2, 0, 1]
    assert source.labels.tolist() == [0, 1, 0]
    assert source.location(1).endswith("a.tar:001.png")


def test_shard_labels_may_be_names_in_json_beside_dotted_image_names(tmp_path, encoded):
    members = {
        "d/1.json": b'{"label": "dog"}',
        "d/1.view.jpg": encoded(1, form="JPEG"),
        "d/2.json": b'{"class": "cat"}',
        "d/2.jpg": encoded(2, form="JPEG"),
        "d/._2.jpg": b"resource fork",
    }
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "dog"])


def test_shards_without_all_labels_have_none(tmp_path, encoded):
    members = {"1.png": encoded(1), "1.cls": b"3", "2.png": encoded(2)}
    assert open_source(write_tar(tmp_path / "a.tar", members)).labels is None


@pytest.mark.parametrize("form", ["*.tar", "s-{000..002}.tar", "s-{000,001,002}.tar", "s-00[0-2].tar", "."])
def test_shards_may_be_a_glob_a_brace_range_or_a_folder(tmp_path, encoded, level_of, form):
    for number in range(3):
        write_tar(tmp_path / f"s-00{number}.tar", {"a.png": encoded(number)})
    source = open_source(str(tmp_path / form))
    assert [level_of(source, i) for i in range(3)] == [0, 1, 2]


def test_a_missing_shard_of_a_range_is_named(tmp_path, encoded):
    write_tar(tmp_path / "s-0.tar", {"a.png": encoded(1)})
    with pytest.raises(UserError, match=r"No file matches .*s-1\.tar \(of .*s-\{0\.\.3\}\.tar\)"):
        open_source(str(tmp_path / "s-{0..3}.tar"))


def test_compressed_and_imageless_shards_are_clear_errors(tmp_path, noisy):
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 99)
    with pytest.raises(UserError, match=r"Cannot read the shard .*none\.tar"):
        open_source(tmp_path / "none.tar")
    write_tar(tmp_path / "zip.tar", {"1.jpg": noisy(1)}, mode="w:gz")
    with pytest.raises(UserError, match="gunzip"):
        open_source(tmp_path / "zip.tar")
    write_tar(tmp_path / "text.tar", {"1.txt": b"x"})
    with pytest.raises(UserError, match="Found 0 images in 1 shard"):
        open_source(tmp_path / "text.tar")


def test_a_shard_that_shrinks_after_it_was_indexed_gives_unreadable_images(tmp_path, noisy):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": noisy(1)})
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableImage, match="the shard is cut short"):
        source.read(0)
