import pytest
import torch
from torch.utils.data import DataLoader

from crate_mae.training.images import epoch_order, micro_slices, step_batches
from crate_mae.training.options import PretrainOptions
from crate_mae.training.randomness import Purpose, derive_seed, seed_step, step_noise


def batches(start_step=0, *, accumulation=1, **place):
    config = PretrainOptions("images", out="run", batch_size=6, seed=5, steps=7, accumulation=accumulation)
    return list(step_batches(23, config, start_step, **place))


def test_an_epoch_shows_distinct_images_and_drops_the_last_that_fill_no_batch():
    first, second = batches()[:3], batches()[3:6]
    for epoch, part in enumerate((first, second)):
        keys = [key for batch in part for key in batch]
        assert {e for _, e in keys} == {epoch}
        assert len({index for index, _ in keys}) == 18
    assert [i for batch in first for i, _ in batch] != [i for batch in second for i, _ in batch]


def test_starting_later_gives_the_same_batches():
    assert batches(start_step=4) == batches()[4:]


def test_processes_and_micro_batches_share_a_global_batch_in_order():
    ranks = [batches(rank=rank, world_size=3, accumulation=2) for rank in range(3)]
    for step, whole in enumerate(batches()):
        shared = [key for rank in ranks for micro in rank[2 * step : 2 * step + 2] for key in micro]
        assert shared == whole


def test_order_depends_on_seed_and_epoch_only():
    assert (epoch_order(1, 2, 31) == epoch_order(1, 2, 31)).all()
    assert (epoch_order(1, 2, 31) != epoch_order(2, 2, 31)).any()
    assert sorted(epoch_order(1, 2, 31)) == list(range(31))


def test_slices_of_all_processes_make_up_the_batch():
    assert micro_slices(12, rank=1, world_size=2, accumulation=3) == [slice(6, 8), slice(8, 10), slice(10, 12)]


def test_a_loader_takes_the_batches_and_never_restarts():
    images = {(i, epoch): i for i in range(23) for epoch in range(3)}
    loader = DataLoader(images, batch_sampler=batches(), collate_fn=list)
    assert len(list(loader)) == 7


def test_seeds_differ_by_purpose_and_position_and_fit_into_63_bits():
    seeds = {derive_seed(seed, purpose, step) for seed in (0, 1) for purpose in Purpose for step in range(50)}
    assert len(seeds) == 2 * len(Purpose) * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_hidden_is_a_function_of_seed_and_step():
    noise = step_noise(3, 11, global_batch=7, num_patches=16)
    assert noise.shape == (7, 16)
    assert torch.equal(noise, step_noise(3, 11, 7, 16))
    assert not torch.equal(noise, step_noise(3, 12, 7, 16))


@pytest.mark.parametrize("position", [(4, 0), (5, 1)])
def test_a_seeded_step_draws_the_same_numbers_again(position):
    with torch.random.fork_rng(devices=[]):
        seed_step(0, *position)
        first = torch.rand(3)
        torch.rand(5)
        seed_step(0, *position)
        assert torch.equal(first, torch.rand(3))
        seed_step(0, 4, 1)
        assert not torch.equal(first, torch.rand(3))
