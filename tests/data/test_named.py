import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from crate_mae.data import UnreadableImage, full_name, open_source
from crate_mae.errors import UserError


class Listed(Dataset):
    """A data set of the given items, which counts how often it is asked."""

    def __init__(self, items):
        self.items = items
        self.asked = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.asked += 1
        return self.items[i]


def test_digits_are_grey_bytes_with_labels():
    source = open_source("digits")
    image = source.read(0)
    assert len(source) == 1797
    assert (image.mode, image.size) == ("L", (8, 8))
    assert np.asarray(image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert source.labels[:4].tolist() == [0, 1, 2, 3]


def test_digit_splits_are_disjoint_and_complete():
    train, test = open_source("digits:train"), open_source("digits:test")
    assert (len(train), len(test)) == (1500, 297)
    assert len({source.location(i) for source in (train, test) for i in range(len(source))}) == 1797
    assert test.label(5) == test.labels[5]


def test_unknown_digit_split_is_an_error():
    with pytest.raises(UserError, match='no split "val": use digits, digits:train or digits:test'):
        open_source("digits:val")


@pytest.mark.parametrize(
    "item",
    [
        Image.new("L", (5, 3), 51),
        torch.full((1, 3, 5), 51, dtype=torch.uint8),
        torch.full((3, 5), 0.2),
        np.full((3, 5), 51, dtype=np.uint8),
        np.full((3, 5, 1), 0.2, dtype=np.float32),
        np.full((3, 5), 13107, dtype=np.uint16),
        (Image.new("L", (5, 3), 51), 7),
        [torch.full((3, 5), 0.2), torch.tensor(7)],
        {"image": Image.new("L", (5, 3), 51), "label": 7},
        {"img": torch.full((3, 5), 0.2), "fine_label": np.int64(7)},
    ],
    ids=lambda item: type(item).__name__,
)
def test_every_kind_of_item_becomes_the_same_image(item):
    source = open_source(Listed([item]))
    image = source.read(0)
    unit = torch.as_tensor(np.asarray(image, dtype=np.float32)).reshape(3, 5)
    unit = unit / 255 if unit.max() > 1 else unit
    torch.testing.assert_close(unit, torch.full((3, 5), 0.2))
    has_label = isinstance(item, (tuple, list, dict))
    assert source.label(0) == (7 if has_label else -1)
    assert (source.labels is not None) == has_label


def test_encoded_bytes_in_a_dict_are_decoded(encoded):
    source = open_source(Listed([{"image": {"bytes": encoded(9), "path": None}}, {"image": {"bytes": b"junk"}}]))
    assert source.read(0).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(UnreadableImage, match=r"Listed\[1\]: not an image"):
        source.read(1)


def test_image_and_label_of_an_item_cost_one_access():
    dataset = Listed([(torch.zeros(1, 2, 2), 3)] * 2)
    source = open_source(dataset)
    source.read(1)
    assert source.label(1) == 3
    assert dataset.asked == 1


def test_labels_come_from_targets_without_reading_items():
    dataset = Listed([(torch.zeros(1, 2, 2), 0)] * 3)
    dataset.targets = [4, 5, 6]
    assert open_source(dataset).labels.tolist() == [4, 5, 6]
    assert dataset.asked == 0


@pytest.mark.parametrize("targets", [[[0, 1], [2], [0]], [torch.zeros(2), torch.zeros(3), torch.zeros(1)]])
def test_several_labels_to_an_image_are_not_its_class(targets):
    dataset = Listed([(torch.zeros(1, 2, 2), 0)] * 3)
    dataset.targets = targets
    assert open_source(dataset).labels.tolist() == [0, 0, 0]  # of the items


def test_subsets_and_tensor_datasets_have_their_own_labels():
    dataset = TensorDataset(torch.zeros(5, 2, 3, 3), torch.arange(5))
    source = open_source(Subset(dataset, [3, 1]))
    assert source.labels.tolist() == [3, 1]
    assert source.read(0).shape == (2, 3, 3)
    assert pickle.loads(pickle.dumps(source)).label(1) == 1


def test_a_list_of_images_is_a_source():
    assert open_source([Image.new("L", (2, 2), 5)] * 3).read(2).getpixel((0, 0)) == 5


def test_a_source_is_passed_through():
    source = open_source("digits")
    assert open_source(source) is source


class Damaged(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        if i:
            raise OSError("image file is truncated")
        return torch.zeros(1, 2, 2), 8


def test_a_damaged_item_is_unreadable_and_has_no_label():
    source = open_source(Damaged())
    with pytest.raises(UnreadableImage, match="truncated"):
        source.read(1)
    assert source.labels.tolist() == [8, -1]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), "has the type torch.int64"),
        (torch.zeros(2, 3, 4, 5), "has the shape"),
        ("a.png", "is a str, not an image"),
        ({"text": 1}, "not an image"),
    ],
)
def test_items_that_are_not_images_are_errors(item, words):
    with pytest.raises(UserError, match=words):
        open_source(Listed([item])).read(0)


def test_iterable_and_empty_data_sets_are_errors():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="map-style"):
        open_source(Stream())
    with pytest.raises(UserError, match="is empty"):
        open_source(Listed([]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("digit", "Did you mean digits?"),
        ("torchvison:CIFAR10", "Did you mean torchvision:CIFAR10?"),
        ("HF:user/name", "Did you mean hf:user/name?"),
        ("torchvision:Cifar-10", "Did you mean torchvision:CIFAR10?"),
        ("torchvision:MNIST:val", "use torchvision:MNIST:train or torchvision:MNIST:test"),
        ("s3://bucket/x", "neither a path nor a known form"),
        ("", "DATA is empty"),
        ("  ", "empty name"),
    ],
)
def test_a_misspelt_form_gets_a_suggestion(data, words):
    with pytest.raises(UserError) as error:
        open_source(data)
    assert words in str(error.value)
    assert str(error.value).count("\n") < 4


def test_a_missing_path_gets_a_suggestion(make_folder):
    root = make_folder({"a.png": 1}, name="photos")
    with pytest.raises(UserError, match=r"photo does not exist\. Did you mean .*photos\?"):
        open_source(root.with_name("photo"))
    with pytest.raises(UserError, match="nor does its folder"):
        open_source(root / "x" / "y" / "z")
    link = root.with_name("link")
    link.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link is a link to nowhere, which does not exist\.$"):
        open_source(link)


def test_a_file_of_another_kind_lists_the_forms(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt is not an image.*\nData is a folder"):
        open_source(tmp_path / "notes.txt")


def test_torchvision_is_opened_by_name_in_the_cache_folder(monkeypatch, own_cache):
    seen = {}

    class CIFAR10(Listed):
        def __init__(self, root, train=True, download=False):
            seen.update(root=root, train=train, download=download)
            super().__init__([(Image.new("L", (2, 2), 5), 1)])
            self.classes = ["a", "b"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    source = open_source("torchvision:CIFAR10:test")
    assert seen == {"root": str(own_cache / "crate-mae" / "torchvision"), "train": False, "download": True}
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [1])


def test_a_failed_download_is_a_clear_error(monkeypatch):
    def fail(root, train=True, download=False):
        raise OSError("<urlopen error no network>")

    class CIFAR10(Listed):
        __init__ = lambda self, root, train=True, download=False: fail(root)  # noqa: E731

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    with pytest.raises(UserError, match=r"Cannot open torchvision:CIFAR10: .*no network.*\n.*check the network"):
        open_source("torchvision:CIFAR10")


@pytest.fixture
def saved(tmp_path, encoded, monkeypatch):
    """A data set with two splits, saved by the `datasets` library."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})

    def split(levels, labels):
        rows = {"image": [{"bytes": encoded(level), "path": None} for level in levels], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    both = datasets.DatasetDict({"train": split([1, 2, 3], [0, 1, 1]), "test": split([4], [0])})
    both.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_hub_data_is_decoded_here_with_labels_and_splits(saved, level_of):
    train, test = open_source(f"hf:{saved}"), open_source(f"hf:{saved}:test")
    assert [level_of(train, i) for i in range(3)] == [1, 2, 3]
    assert (train.labels.tolist(), train.classes) == ([0, 1, 1], ["cat", "dog"])
    assert (len(test), level_of(test, 0)) == (1, 4)
    with pytest.raises(UserError, match=r'has no split "dev": use hf:.*:train, hf:.*:test'):
        open_source(f"hf:{saved}:dev")


def test_a_folder_saved_by_datasets_suggests_its_form(saved):
    with pytest.raises(UserError, match=r"opened as hf:.*saved"):
        open_source(saved)


def test_a_missing_datasets_library_is_reported_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install '.*\[hub\]'"):
        open_source("hf:user/name")


def test_full_names_find_the_same_data_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "photos"):
        (tmp_path / name).mkdir()
    assert full_name("photos") == full_name(Path("photos")) == str(tmp_path.resolve() / "photos")
    assert full_name("shards/{0..3}.tar") == str(tmp_path.resolve() / "shards" / "{0..3}.tar")
    # The digits of scikit-learn, and not the folder of that name, as `open_source` understands it too.
    assert full_name("digits") == "digits"
    assert full_name(Path("digits")) == str(tmp_path.resolve() / "digits")
    assert full_name("hf:user/photos:train") == "hf:user/photos:train"
    (tmp_path / "saved").mkdir()
    assert full_name("hf:saved:train") == f"hf:{tmp_path.resolve() / 'saved'}:train"
    assert full_name("~nobody-at-all/photos") == "~nobody-at-all/photos"
    assert full_name("hf:") == "hf:"  # and not the current folder
    assert full_name("nowhere") == "nowhere"
