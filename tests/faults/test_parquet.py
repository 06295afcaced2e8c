"""Parquet files with odd labels and metadata, and damaged ones."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crate_mae.data import UnreadableImage, label_names, open_source, parquet
from crate_mae.errors import UserError
from tests.faults.kinds.sources import mutated


def png(level=1):
    with io.BytesIO() as buffer:
        Image.new("L", (8, 8), level).save(buffer, "PNG")
        return buffer.getvalue()


def write(path, labels, names=None, metadata=None, column="label"):
    table = pa.table({"image": [png()] * len(labels)} | ({} if column is None else {column: labels}))
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        metadata = json.dumps({"info": {"features": features}}).encode()
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, path)
    return path


def test_files_that_number_their_classes_differently_are_brought_together(tmp_path):
    write(tmp_path / "train-0.parquet", pa.array([0, 1]), ["cat", "dog"])
    write(tmp_path / "train-1.parquet", pa.array([0, 1, 2]), ["dog", "emu", "cat"])
    source = open_source(tmp_path)
    assert label_names(source) == ["cat", "dog", "dog", "emu", "cat"]
    assert source.classes == ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("labels", "names", "column"),
    [(pa.array([0, 1]), None, "label"), (pa.array([0, 1]), ["a", "b"], None), (pa.array([0, 1]), None, "class")],
    ids=["no names", "no labels", "another column"],
)
def test_files_with_labels_of_different_kinds_are_refused(tmp_path, labels, names, column):
    write(tmp_path / "train-0.parquet", pa.array([0, 1]), ["cat", "dog"])
    write(tmp_path / "train-1.parquet", labels, names if column else None, column=column)
    with pytest.raises(UserError, match=r"The files have different labels.*train-0.*train-1"):
        open_source(tmp_path)


def test_a_file_of_numbers_beside_a_file_of_names_has_names(tmp_path):
    write(tmp_path / "train-0.parquet", pa.array([0, 10]))
    write(tmp_path / "train-1.parquet", pa.array(["10", "x"]))
    assert label_names(open_source(tmp_path)) == ["0", "10", "10", "x"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([0, 2], pa.uint64()), ["0", "2"]),
        (pa.array([2**64 - 1, 5], pa.uint64()), [str(2**64 - 1), "5"]),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        (pa.array([7, 3]).dictionary_encode(), ["7", "3"]),
        (pa.array(["10", "2"]), ["10", "2"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array([-1, 0]), None),
        (pa.array([None, 0], pa.int64()), None),
    ],
)
def test_labels_of_every_type_keep_their_values(tmp_path, labels, expected):
    assert label_names(open_source(write(tmp_path / "x.parquet", labels))) == expected


def test_a_pandas_categorical_is_a_column_of_labels(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [png()] * 3, "label": pandas.Categorical(["x", "10", "x"])})
    frame.to_parquet(tmp_path / "x.parquet")
    assert label_names(open_source(tmp_path)) == ["x", "10", "x"]


def test_names_that_are_numbers_are_names(tmp_path):
    assert label_names(open_source(write(tmp_path / "x.parquet", pa.array([0, 1]), [10, "2"]))) == ["10", "2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (5, "not a list of names"),
        ("cat", "not a list of names"),
        ({"0": "cat"}, "not a list of names"),
        ([["cat"]], "not a list of names"),
        (["cat"], "has the label 1, but names for 1 classes only"),
        ([], "has the label 1, but names for 0 classes only"),
    ],
)
def test_class_names_that_cannot_be_used_are_a_sentence(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "x.parquet", pa.array([0, 1]), names))


@pytest.mark.parametrize(
    "metadata",
    [b"[" * 100_000, b"\xff", b"null", b"{}", b'{"info": []}', b'{"info": {"features": [1]}}', b"1" * 5000],
)
def test_metadata_of_another_shape_are_left_aside_and_named(tmp_path, metadata, caplog):
    source = open_source(write(tmp_path / "x.parquet", pa.array([0, 1]), metadata=metadata))
    assert (label_names(source), source.classes) == (["0", "1"], None)
    assert "x.parquet: column types and class names in its metadata are not understood" in caplog.text


def test_damaged_files_are_sentences(tmp_path):
    whole = write(tmp_path / "whole.parquet", pa.array([0, 1, 2] * 5), ["a", "b", "c"]).read_bytes()
    for seed in range(60):
        (tmp_path / "x.parquet").write_bytes(mutated(random.Random(seed), whole))
        try:
            source = open_source(tmp_path / "x.parquet")
        except UserError:
            continue
        for i in range(len(source)):
            try:
                source.read(i)
            except UnreadableImage as error:
                assert error.reason


def test_columns_of_one_name_are_a_sentence(tmp_path):
    table = pa.Table.from_arrays([pa.array([png()]), pa.array([png()])], names=["image", "image"])
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    try:
        assert np.asarray(source.read(0)).shape == (8, 8)
    except UnreadableImage as error:
        assert "cannot be read" in error.reason


def varint(number, length=0):
    """A whole number as parquet writes it, padded to a length."""
    parts = []
    while number > 127 or len(parts) + 1 < length:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
def test_pages_that_unpack_to_more_than_they_declare_are_refused(tmp_path, codec):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [bytes(2**20)]}), path, compression=codec, use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    true = varint(2 * (2**20 + 4 + 6))  # signed numbers are doubled; 4 bytes of length and 6 of levels
    at = content.index(true, column.data_page_offset)
    assert at < column.data_page_offset + 8  # in the header of the page
    content[at : at + len(true)] = varint(2 * 4096, len(true))
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="its row group cannot be read"):
        open_source(path).read(0)


@pytest.mark.parametrize("column", ["image", "struct", "label"])
def test_values_that_a_dictionary_repeats_take_little_memory(tmp_path, column, monkeypatch):
    monkeypatch.setattr(parquet, "_MOST_GROUP_BYTES", 2**20)
    image, label = png() + bytes(2**16), "name" * 2**10
    images = [{"bytes": image}] * 2000 if column == "struct" else [image if column == "image" else png()] * 2000
    pq.write_table(pa.table({"image": images, "label": [label] * 2000}), tmp_path / "x.parquet", row_group_size=2000)
    source = open_source(tmp_path / "x.parquet")
    assert source.classes == [label]
    if column == "label":
        assert source.read(1999).size == (8, 8)
    else:
        with pytest.raises(UnreadableImage, match="more than the 1,048,576 that are read at once"):
            source.read(0)
    assert len({id(name) for name in parquet._File(tmp_path / "x.parquet").labels}) == 1
