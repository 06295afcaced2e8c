"""A fingerprint is the same for the same images, and changes if one of them may have changed."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crate_mae.data import open_source
from crate_mae.data.files import whole_file
from crate_mae.errors import UserError


def test_of_a_folder_by_names_sizes_and_times(make_folder, encoded):
    folder = make_folder({"a/1.png": 10, "b/2.png": 20})
    seen = [open_source(folder).fingerprint()]
    assert open_source(folder).fingerprint() == seen[0]
    os.utime(folder / "a" / "1.png", ns=(5, 5))
    seen.append(open_source(folder).fingerprint())
    (folder / "a" / "1.png").write_bytes(encoded(11, size=(70, 50)))
    os.utime(folder / "a" / "1.png", ns=(5, 5))
    seen.append(open_source(folder).fingerprint())
    (folder / "b" / "2.png").rename(folder / "b" / "3.png")
    seen.append(open_source(folder).fingerprint())
    assert len(set(seen)) == 4
    (folder / "b" / "3.png").unlink()
    source = open_source(folder)
    (folder / "a" / "1.png").unlink()
    assert source.fingerprint() is None  # a file that cannot be looked at


def test_of_a_parquet_file(tmp_path, encoded):
    def fingerprint(levels):
        pq.write_table(pa.table({"image": [encoded(level) for level in levels]}), tmp_path / "x.parquet")
        os.utime(tmp_path / "x.parquet", ns=(7, 7))
        return open_source(tmp_path / "x.parquet").fingerprint()

    one, two = fingerprint([1]), fingerprint([1, 2])
    assert one != two
    assert one is not None
    assert fingerprint([1]) == one


def test_of_digits_and_python_objects():
    names = ("digits", "digits:train", "digits:test")
    assert len({open_source(name).fingerprint() for name in names}) == 3
    assert open_source([torch.zeros(3, 8, 8)]).fingerprint() is None


def test_of_a_hub_data_set(tmp_path, encoded):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    for name, levels in (("one", [1]), ("two", [1, 2])):
        rows = {"image": [{"bytes": encoded(level), "path": None} for level in levels]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / name))
    one, same, two = (open_source(f"hf:{tmp_path / name}").fingerprint() for name in ("one", "one", "two"))
    assert one == same != two


def test_arrays_that_may_not_be_written_to_are_taken_without_a_warning():
    pixels = np.full((5, 7, 3), 9, dtype=np.uint8)
    pixels.setflags(write=False)
    assert int(open_source([pixels]).read(0)[0, 0, 0]) == 9


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"all of it"
    with pytest.raises(UserError, match="Cannot write"), whole_file(path / "below a file") as temporary:
        pass
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
