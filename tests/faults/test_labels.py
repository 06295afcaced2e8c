"""Labels and class names of sources: none is taken for another, and none is without a name where there are names."""

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import label_names, open_source
from crate_mae.data.base import align_classes, aligned_labels
from crate_mae.errors import UserError

PICTURE = np.zeros((8, 8), np.uint8)


class Data:
    """A data set as users write them."""

    def __init__(self, labels, classes=None, targets=None):
        self.own = labels
        if classes is not None:
            self.classes = classes
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return len(self.own)

    def __getitem__(self, i):
        return PICTURE, self.own[i]


@pytest.mark.parametrize("targets", [None, [0, 1, 2], torch.tensor([0, 1, 2]), np.array([0, 1, 2], np.uint64)])
def test_labels_beyond_the_class_names_are_refused(targets):
    source = open_source(Data([0, 1, 2], ["cat", "dog"], targets))
    with pytest.raises(UserError, match=r"has the label 2, but names for 2 classes only \(cat, dog\)"):
        _ = source.labels
    with pytest.raises(UserError, match="has the label 2"):
        open_source(Data([0, 1, 2], ["cat", "dog"], targets)).label(2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Data([0, 2**64 - 1]), ["0", str(2**64 - 1)]),
        (Data([0, 1], targets=np.array([0, 2**64 - 1], np.uint64)), ["0", "1"]),
        (Data(["dog", "cat"]), ["dog", "cat"]),
        (Data(["dog", "cat"], ["dog", "cat", "emu"]), ["dog", "cat"]),
        (Data(["10", 2]), ["10", "2"]),
        (Data([1, 0], (10, 20)), ["20", "10"]),
        (Data([np.int32(1), torch.tensor(0)]), ["1", "0"]),
        (Data([-1, 0]), None),
        (Data([0.5, 0]), None),
        (Data(["\ud800", "a"]), ["\\ud800", "a"]),
    ],
)
def test_labels_of_python_data_sets_keep_their_names(data, expected):
    source = open_source(data)
    assert label_names(source) == expected


def test_names_of_labels_are_numbered_as_the_data_sets_own_classes():
    source = open_source(Data(["emu", "cat"], ["emu", "dog", "cat"]))
    assert source.label(0) == -1  # not numbered yet
    assert (source.labels.tolist(), source.classes) == ([0, 2], ["emu", "dog", "cat"])
    assert source.label(1) == 2


def test_names_that_look_like_numbers_are_aligned_by_name(tmp_path):
    for name in ("0", "2", "10", "01"):
        (tmp_path / name).mkdir()
        Image.fromarray(PICTURE).save(tmp_path / name / "x.png")
    folder = open_source(tmp_path)
    numbers = open_source(Data([10, 0, 2]))
    assert folder.classes == ["0", "01", "10", "2"]
    classes = align_classes(folder, numbers)
    assert [classes[label] for label in aligned_labels(numbers, classes)] == ["10", "0", "2"]
