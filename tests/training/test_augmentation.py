"""RandAugment inside our transforms: random as everything else is, and reading that leaves images out."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import ImageDataset, finetune_transform, open_source, readable_batches
from crate_mae.data.dataset import load
from crate_mae.data.transforms import evaluation_transform
from crate_mae.errors import UserError

POLICY = "rand-m9-mstd0.5-inc1"


def prepared(policy=POLICY, channels=1, **options):
    return finetune_transform((8, 8), channels, (0.3,) * channels, (0.4,) * channels, rand_augment=policy, **options)


def test_the_same_key_gives_the_same_image_whatever_was_drawn_before():
    data = ImageDataset(open_source("digits"), prepared(), seed=5)
    keys = [(i, epoch) for i in range(30) for epoch in range(2)]
    first = [data[key].image for key in keys]
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    again = [data[key].image for key in reversed(keys)][::-1]
    assert all(map(torch.equal, first, again))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert sum(torch.equal(first[i], first[i + 1]) for i in range(0, 60, 2)) < 5


def test_rand_augment_changes_images_and_nothing_else_of_the_transform():
    source = open_source("digits")
    with_, without = (ImageDataset(source, prepared(policy), seed=5) for policy in (POLICY, ""))
    changed = sum(not torch.equal(with_[i].image, without[i].image) for i in range(100))
    assert 50 < changed <= 100  # each of two operations is applied to half of the images


@pytest.mark.parametrize("policy", ["rand-m10-p1-inc1", "rand-m1-p1", "rand-m9-p1-n5-mstd0.5-inc1-tweights"])
@pytest.mark.parametrize("channels", [1, 3])
def test_strong_and_weak_policies_take_grey_colour_and_deep_images(policy, channels):
    rng = np.random.default_rng(0)
    shape = (8, 8) if channels == 1 else (8, 8, 3)
    eight_bit = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    transform = prepared(policy, channels)
    for image in (eight_bit, torch.rand(channels, 8, 8), torch.zeros(channels, 9, 8, dtype=torch.uint8)):
        for seed in range(20):
            torch.manual_seed(seed)
            values = transform(image) * 0.4 + 0.3
            assert values.shape == (channels, 8, 8)
            assert float(values.min()) >= -1e-5 and float(values.max()) <= 1 + 1e-5


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-q3", "rand-mfew-m3.x"])
def test_a_policy_that_timm_does_not_know_is_one_sentence(policy):
    with pytest.raises(UserError, match=f'--rand-augment "{policy}" is not understood'):
        prepared(policy)


def test_two_channels_have_no_colours_to_augment():
    with pytest.raises(UserError, match="not 2 channels"):
        prepared(channels=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_readable_batches_leave_out_what_cannot_be_read(tmp_path, workers):
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(path)
        if i in (1, 4, 5):
            path.write_bytes(b"no image")
    transform = evaluation_transform((8, 8), 1, (0.0,), (1.0,))
    batches = list(readable_batches(open_source(tmp_path), transform, 2, workers=workers))
    assert [batch.indices.tolist() for batch in batches] == [[0], [2, 3], [], [6]]
    assert [len(batch.images) for batch in batches] == [1, 2, 0, 1]
    assert [[bad.location[-5:] for bad in batch.bad] for batch in batches] == [["1.png"], [], ["4.png", "5.png"], []]


def refuse(key):
    if key == 3:
        raise UserError("Too deep.\nGive a UserError: text.")
    return key


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_loader_process_meets_is_raised_with_its_own_message(workers):
    loaded = load(refuse, [[0, 1], [2, 3]], list, workers=workers)
    assert next(loaded) == [0, 1]
    with pytest.raises(UserError) as refused:
        next(loaded)
    assert str(refused.value) == "Too deep.\nGive a UserError: text."
