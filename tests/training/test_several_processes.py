"""Several real processes that train together as one would alone.

They have the environment that `accelerate launch` gives them. It itself launches the run of test_slurm.py, and torchrun
one of test_sharding.py, which ends with the weights of one process too, and one of the tutorials.
"""

import pytest

from tests.training.real_processes import MONOTONE, column, finish, largest_difference, unsharded, world_size


@pytest.mark.parametrize("options", [("steps=12",), ("steps=6", MONOTONE)], ids=["published layers", "monotone layers"])
def test_several_processes_give_the_weights_of_one(tmp_path, driver, options):
    alone, together = tmp_path / "one", tmp_path / "several"
    one = driver("pretrain", alone, *options)
    finish(driver("pretrain", together, *options, environments=unsharded(2)))
    finish(one)
    last = options[0].replace("steps=", "step-")
    assert [world_size(run / "checkpoints" / last) for run in (alone, together)] == [1, 2]
    assert largest_difference(alone, together) < 1e-5
    assert column(alone, 0) == column(together, 0)
    losses = [[float(loss) for loss in column(run, 2)[1:]] for run in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_fine_tune_as_one(tmp_path, driver, encoder_folder):
    options = (f"model={encoder_folder}", "steps=8", "monitor_steps=4", "drop_path=0.0")
    alone, together = tmp_path / "one", tmp_path / "two"
    one = driver("finetune", alone, *options)
    finish(driver("finetune", together, *options, environments=unsharded(2)))
    finish(one)
    assert world_size(together / "checkpoints" / "step-8") == 2
    assert largest_difference(*(run / "checkpoints" / "step-8" for run in (alone, together))) < 1e-5
    assert column(alone, 8) == column(together, 8)  # accuracies
