import re
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from crate_mae.data import (
    BadImage,
    ImageDataset,
    collate,
    evaluation_transform,
    open_source,
    pretrain_transform,
    readable_batches,
)
from crate_mae.data.base import Part
from crate_mae.errors import UserError

HALF = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def mixed(make_folder, noisy):
    """A folder of 11 noisy images, of which 2, 5 and 6 cannot be read."""
    root = make_folder({"ignored.txt": 0})
    for i in range(11):
        (root / f"{i:02}.jpg").write_bytes(noisy(i))
    (root / "02.jpg").write_bytes(b"")
    (root / "05.jpg").write_bytes(noisy(5)[:900])
    (root / "06.jpg").write_bytes(b"text")
    return open_source(root)


@pytest.fixture
def dataset(mixed):
    return ImageDataset(mixed, pretrain_transform((13, 17), 3, *HALF), seed=3)


def test_the_same_key_gives_the_same_sample(dataset):
    first, again = dataset[(4, 7)], dataset[(4, 7)]
    assert torch.equal(first.image, again.image)
    assert (first.index, first.label, first.bad) == (4, -1, ())


def test_epoch_seed_and_index_each_change_the_augmentation(dataset, mixed):
    base = dataset[(4, 7)].image
    other_seed = ImageDataset(mixed, dataset.transform, seed=4)
    assert not torch.equal(base, dataset[(4, 8)].image)
    assert not torch.equal(base, other_seed[(4, 7)].image)
    assert not torch.equal(base, dataset[(7, 4)].image)


def test_a_plain_index_is_epoch_zero(dataset):
    assert torch.equal(dataset[3].image, dataset[(3, 0)].image)


def test_processes_that_read_images_leave_interrupts_to_the_main_process(mixed):
    def ignores(_image):
        return torch.tensor([[[float(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)]]])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        batches = [next(readable_batches(mixed, ignores, 99, workers=workers)) for workers in (0, 1)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert [batch.images.flatten().tolist() for batch in batches] == [[0.0] * 8, [1.0] * 8]


def test_the_random_state_of_the_caller_is_untouched(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[(2, 1)]
    assert torch.equal(torch.rand(3), expected)


def test_workers_give_the_same_batches_as_the_main_process(dataset):
    keys = [(i, epoch) for epoch in (0, 1) for i in range(11)]

    def batches(workers):
        options = {"multiprocessing_context": "forkserver"} if workers == 1 else {}
        return list(DataLoader(dataset, 5, sampler=keys, num_workers=workers, collate_fn=collate, **options))

    expected = batches(0)
    for other in (batches(1), batches(2)):
        for left, right in zip(expected, other, strict=True):
            assert torch.equal(left.images, right.images)
            assert torch.equal(left.indices, right.indices)
            assert left.bad == right.bad


def test_an_unreadable_image_is_replaced_and_reported(dataset):
    sample = dataset[(2, 0)]
    assert sample.index not in (2, 5, 6)
    assert sample.bad[0].location.endswith("02.jpg")
    assert sample.bad[0].reason == "the file is empty (0 bytes)"
    assert torch.equal(sample.image, dataset[(2, 0)].image)


def test_replacements_differ_between_epochs(dataset):
    assert len({dataset[(2, epoch)].index for epoch in range(12)}) > 2


def test_if_nothing_can_be_read_the_first_reason_is_reported(make_folder):
    root = make_folder({"a.png": 1, "b.png": 2, "c.png": 3})
    for path in root.iterdir():
        path.write_bytes(b"")
    dataset = ImageDataset(open_source(root), evaluation_transform((3, 3), 3, *HALF))
    with pytest.raises(UserError) as refused:
        dataset[1]
    words = r"3 images in a row cannot be read, the first of them\n.*b\.png: the file is em(.|\n)*crate-mae data check "
    assert re.search(words + re.escape(str(root)), str(refused.value))


def test_no_command_is_named_that_cannot_open_the_images():
    assert open_source([torch.zeros(1, 3, 3)]).check_command is None
    dataset = ImageDataset(open_source([b"", b""]), evaluation_transform((3, 3), 3, *HALF))
    with pytest.raises(UserError, match="2 images in a row cannot be read") as refused:
        dataset[1]
    assert "data check" not in str(refused.value)
    part = Part(open_source("digits:test"), np.arange(3))
    assert part.check_command == "crate-mae data check digits:test"


def test_replacement_tries_are_bounded(make_folder):
    root = make_folder({f"{i:02}.png": 1 for i in range(50)})
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="21 images in a row"):
        ImageDataset(open_source(root), evaluation_transform((3, 3), 3, *HALF))[0]


def test_batches_hold_labels_indices_and_all_bad_images():
    dataset = ImageDataset(open_source("digits"), evaluation_transform((8, 8), 1, (0.5,), (0.25,)))
    batch = collate([dataset[1], dataset[3]._replace(bad=(BadImage("x", "y"),))])
    assert batch.images.shape == (2, 1, 8, 8)
    assert batch.labels.tolist() == batch.indices.tolist() == [1, 3]
    assert batch.bad == (BadImage("x", "y"),)
    assert batch.images.is_contiguous()


def test_a_negative_seed_is_an_error(mixed):
    with pytest.raises(UserError, match="not be negative"):
        ImageDataset(mixed, evaluation_transform((3, 3), 3, *HALF), seed=-1)
