"""Tar shards divided among processes and their loaders: every image of an epoch once, by whomever."""

import dataclasses
import io
import tarfile
from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import evaluation_transform, open_source
from crate_mae.training.images import training_batches

IMAGES = 66

# Two loader processes are what is tested, also where there is one core for them.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def shards(tmp_path):
    """66 images in shards of unequal size, each image of a grey of its own."""
    for number, members in enumerate(np.split(np.arange(IMAGES), [7, 30, 31])):
        with tarfile.open(tmp_path / f"{number:06}.tar", "w") as shard:
            for i in members:
                content = io.BytesIO()
                Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(content, "png")
                member = tarfile.TarInfo(f"{i:06}.png")
                member.size = content.tell()
                content.seek(0)
                shard.addfile(member, content)
    return open_source(str(tmp_path / "{000000..000003}.tar"))


def seen(source, config, processes, start_step, stop_step):
    """The greys that each process is shown from one step to another, by two loader processes each."""
    transform = evaluation_transform((8, 8), 1, (0.0,), (1.0,))
    options = dataclasses.replace(config, workers=2, steps=stop_step, flip=False)
    greys = []
    for rank in range(processes):
        device = torch.device("cpu")
        batches = training_batches(
            source, transform, options, start_step, rank=rank, world_size=processes, device=device
        )
        with closing(batches):
            micro = options.accumulation * (stop_step - start_step)
            of_rank = [round(255 * float(image.mean())) for batch in islice(batches, micro) for image in batch.images]
        assert len(of_rank) == options.batch_size * (stop_step - start_step) // processes
        greys += of_rank
    return greys


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 2)])
def test_an_epoch_shows_every_image_of_the_shards_once(shards, config, processes, accumulation):
    options = dataclasses.replace(config, batch_size=6, accumulation=accumulation)
    assert sorted(seen(shards, options, processes, 0, 11)) == list(range(IMAGES))


def test_an_epoch_that_goes_on_with_more_processes_shows_every_image_once(shards, config):
    options = dataclasses.replace(config, batch_size=6)
    before, after = seen(shards, options, 2, 0, 4), seen(shards, options, 3, 4, 11)
    assert sorted(before + after) == list(range(IMAGES))


def test_without_a_full_last_batch_none_is_shown_twice(shards, config):
    counts = Counter(seen(shards, dataclasses.replace(config, batch_size=24), 2, 0, 2))
    assert len(counts) == 48
    assert set(counts.values()) == {1}
