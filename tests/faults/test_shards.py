"""Damaged, odd and hostile tar shards: what can be read is read, and nothing is left out silently."""

import io
import tarfile
import tracemalloc

import pytest
from PIL import Image

from crate_mae.data import UnreadableImage, open_source
from crate_mae.data.base import refuse_unreadable
from crate_mae.data.facts import check
from crate_mae.errors import UserError


def png(level):
    with io.BytesIO() as buffer:
        Image.new("L", (8, 8), level).save(buffer, "PNG")
        return buffer.getvalue()


def write(path, members, form=tarfile.GNU_FORMAT, kinds=None, headers=None):
    """A shard of (name, content) pairs; `kinds` and `headers` by number of the member."""
    with tarfile.open(path, "w", format=form) as shard:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = (headers or {}).get(number, {})
            if number in (kinds or {}):
                info.type, info.linkname, info.size = kinds[number], "0.png", 0
            shard.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def images(count, first=0):
    return [(f"{number}.png", png(number)) for number in range(first, first + count)]


def bad_of(source):
    found = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except UnreadableImage as error:
            found[i] = error.reason
    return found


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "a link in the shard"),
        (tarfile.LNKTYPE, "a link in the shard"),
        (tarfile.FIFOTYPE, "a pipe or a device"),
        (tarfile.CHRTYPE, "a pipe or a device"),
    ],
)
def test_members_that_are_not_plain_files_are_bad_images(tmp_path, kind, reason):
    source = open_source(write(tmp_path / "x.tar", images(4), kinds={2: kind}))
    assert len(source) == 4
    assert list(bad_of(source)) == [2]
    assert reason in bad_of(source)[2]
    assert source.location(2).endswith("x.tar:2.png")


def test_sparse_members_are_never_unpacked(tmp_path):
    header = bytearray(tarfile.TarInfo("0.json").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = b"%011o\0" % 512, b"S"
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % (7 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest = write(tmp_path / "x.tar", images(3)).read_bytes()
    for name in (b"0.json", b"9.png\0"):
        header[148:156] = b" " * 8
        header[:6] = name
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "x.tar").write_bytes(bytes(header) + b"x" * 512 + rest)
        tracemalloc.start()
        source = open_source(tmp_path / "x.tar")
        bad = bad_of(source)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
        assert list(bad.values()) == (["a sparse file in the shard, not a plain one"] if name[:1] == b"9" else [])


@pytest.mark.parametrize(
    "header",
    [
        {"size": str(2**70)},
        {"size": "-512"},
        {"size": "x"},
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": str(2**50),
            "GNU.sparse.name": "q.png",
        },
        {"GNU.sparse.map": "0,1,x", "GNU.sparse.size": "9"},
    ],
)
def test_hostile_headers_are_the_end_of_a_shard_or_a_bad_image(tmp_path, header):
    members = [*images(3), ("9.png", b"1\n0\n512\n" + bytes(1015)), *images(3, 3)]
    path = write(tmp_path / "x.tar", members, tarfile.PAX_FORMAT, headers={3: header})
    bad = bad_of(open_source(path))
    assert bad
    assert min(bad) >= 3


def test_the_readable_part_of_a_damaged_shard_is_used_as_far_as_max_bad_allows(tmp_path):
    whole = write(tmp_path / "x.tar", images(20)).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 1024 * 15] + b"x" * 512 + whole[1024 * 15 + 512 :])
    source = open_source(tmp_path / "x.tar")
    bad = bad_of(source)
    assert min(bad) == 15  # the first 15 images are read
    assert 4 <= len(bad) <= 20  # five were lost, and the padding of an archive counts
    assert "lost: the shard is damaged after byte 15,360 (a header is damaged)" in bad[15]
    assert "x.tar:(lost image 1)" in source.location(15)
    report = check(source)
    assert report.images - len(report.bad) == 15
    refuse_unreadable(source, report.bad, 0.5)
    with pytest.raises(UserError, match=r"cannot be read, more than the limit \(a share of 0\.01\)"):
        refuse_unreadable(source, report.bad, 0.01)


@pytest.mark.parametrize("keep", [1024 * 5 + 100, 1024 * 5 + 530, 1024 * 5], ids=["header", "content", "end"])
def test_a_shard_that_is_cut_short_says_so(tmp_path, keep):
    path = write(tmp_path / "x.tar", images(9))
    path.write_bytes(path.read_bytes()[:keep])
    bad = bad_of(open_source(path))
    assert min(bad) == 5
    assert all("cut short" in reason or "damaged" in reason for reason in bad.values())


def test_an_archive_behind_another_is_not_left_out_silently(tmp_path):
    both = write(tmp_path / "a.tar", images(3)).read_bytes() + write(tmp_path / "b.tar", images(3, 3)).read_bytes()
    (tmp_path / "c.tar").write_bytes(both)
    reasons = list(bad_of(open_source(tmp_path / "c.tar")).values())
    assert reasons
    assert all("another archive follows" in reason for reason in reasons)


@pytest.mark.parametrize("at", range(0, 512, 37))
def test_a_damaged_byte_of_a_header_is_noticed(tmp_path, at):
    content = bytearray(write(tmp_path / "x.tar", images(6)).read_bytes())
    content[3 * 1024 + at] ^= 0x15
    (tmp_path / "x.tar").write_bytes(bytes(content))
    bad = bad_of(open_source(tmp_path / "x.tar"))
    assert bad
    assert min(bad) == 3


def test_of_two_members_of_one_name_the_last_counts_and_the_other_is_named(tmp_path, caplog):
    members = [
        ("k.png", png(10)),
        ("k.cls", b"0"),
        ("j.png", png(5)),
        ("j.cls", b"2"),
        ("k.png", png(20)),
        ("k.cls", b"1"),
    ]
    source = open_source(write(tmp_path / "x.tar", members))
    assert [(source.read(i).getpixel((0, 0)), source.label(i)) for i in range(len(source))] == [(5, 2), (20, 1)]
    assert "1 image(s) have the name of a later one, which takes their place: 'k.png'" in caplog.text


@pytest.mark.parametrize(
    ("texts", "labels", "classes"),
    [
        (("0", "10", "2"), [0, 10, 2], None),
        (("1", "cat", "10"), [0, 2, 1], ["1", "10", "cat"]),
        (("007", "7", "7"), [0, 1, 1], ["007", "7"]),
        (("1_0", "10", "2"), [1, 0, 2], ["10", "1_0", "2"]),
        (("9" * 30, "1", "9" * 30), [1, 0, 1], ["1", "9" * 30]),
        (("²", "2", "2"), [1, 0, 0], ["2", "²"]),
        (("-1", "2", "2"), None, None),
    ],
)
def test_labels_are_numbers_only_if_all_are_written_as_numbers(tmp_path, texts, labels, classes):
    pairs = [pair for i, text in enumerate(texts) for pair in ((f"{i}.png", png(i)), (f"{i}.cls", text.encode()))]
    source = open_source(write(tmp_path / "x.tar", pairs))
    assert source.classes == classes
    assert (None if source.labels is None else source.labels.tolist()) == labels


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b'{"label": 1e999}', b"9" * 5000, b"[1]", b"{", b""])
def test_hostile_json_is_no_label(tmp_path, content):
    source = open_source(write(tmp_path / "x.tar", [*images(2), ("0.json", content), ("1.json", b'{"label": 1}')]))
    assert source.labels is None


def test_labels_that_cannot_be_read_are_named(tmp_path, caplog):
    open_source(write(tmp_path / "x.tar", [*images(2), ("0.cls", b"\xff\xfe"), ("1.cls", b"1")]))
    assert "1 label(s) cannot be read" in caplog.text


def test_members_that_are_no_images_are_counted(tmp_path):
    path = write(tmp_path / "x.tar", [*images(2), ("2.jxl", b""), ("3.cr2", b""), ("4.jxl", b"")])
    assert check(open_source(path)).left_out == {".jxl": 2, ".cr2": 1}


def test_a_shard_of_files_that_are_not_read_names_them(tmp_path):
    with pytest.raises(UserError, match=r"Found 0 images in 1 shard.*: 1 \.cr2, 1 \.nef\."):
        open_source(write(tmp_path / "x.tar", [("1.cr2", b"x"), ("2.nef", b"x")]))
