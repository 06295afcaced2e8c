import pytest

from crate_mae.data import BadImage
from crate_mae.training.images import BadImages
from crate_mae.training.run_directory import CsvLog


@pytest.fixture
def table(tmp_path):
    return CsvLog(tmp_path / "bad_files.csv", ("step", "location", "reason"))


def images(*names):
    return [BadImage(name, "is\n truncated") for name in names]


def test_each_bad_image_is_listed_once_also_after_a_resume(table):
    bad = BadImages(table, 0.01)
    assert bad.add(3, images("a", "b", "a"))
    assert not bad.add(4, images("b"))
    again = BadImages(table, 0.01)
    assert not again.add(5, images("a"))
    assert len(again) == 2
    assert table.read()[0] == {"step": "3", "location": "a", "reason": "is truncated"}


def test_the_limit_is_a_share_of_the_images_seen_but_of_a_hundred_at_least(table):
    bad = BadImages(table, 0.01)
    bad.add(1, images("a"))
    assert not bad.too_many(seen=8)
    bad.add(1, images("b"))
    assert bad.too_many(seen=8)
    assert bad.too_many(seen=199)
    assert not bad.too_many(seen=200)


def test_with_a_limit_of_zero_the_first_is_too_many(table):
    bad = BadImages(table, 0.0)
    assert not bad.too_many(seen=1000)
    bad.add(1, images("a"))
    assert bad.too_many(seen=1000)


def test_the_message_names_how_many_which_and_where(table):
    bad = BadImages(table, 0.01)
    bad.add(1, images("a", "b", "c", "d"))
    message = str(bad.error(300, "RESUME", check="CHECK"))
    assert "4 of the first 300" in message
    assert "a (is truncated); b (is truncated); c" in message and "; d" not in message
    assert f"All so far are listed in {table.path}; CHECK finds the others. Fix or remove them, then: RESUME" in message


def test_a_process_that_does_not_write_only_counts(table):
    bad = BadImages(table, 0.01, writes=False)
    assert bad.add(1, images("a"))
    assert not table.path.exists()
