"""A step that does not fit in memory is refused where that is certain, and halved once where it turns out."""

import os

import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.classifier import Classifier
from crate_mae.training import preflight
from crate_mae.training.config import load_config
from crate_mae.training.preflight import StepTooLargeError, first_step, peak_memory, restart_peak


@pytest.fixture
def limited(monkeypatch):
    """`limited(n, error)`: from now on models raise an error for more than n images at a time in training."""
    plain = MaskedAutoencoder.forward

    def limit(images, error):
        def forward(self, x, *args, **kwargs):
            if self.training and len(x) > images:
                raise error
            return plain(self, x, *args, **kwargs)

        monkeypatch.setattr(MaskedAutoencoder, "forward", forward)

    return limit


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, ON_A_CPU, MemoryError()], ids=["cuda", "cpu", "python"])
def test_a_step_that_does_not_fit_is_halved_once(tiny_run, limited, capsys, error):
    whole = tiny_run("whole", steps=3, accumulation=2)
    limited(12, error)
    halved = tiny_run("halved", steps=3, quiet=False)
    assert "does not fit in memory: continuing with --accumulation 2" in capsys.readouterr().out
    assert load_config(halved.path / "config.yaml").accumulation == 2
    weights, expected = halved.model().state_dict(), whole.model().state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_step_of_a_run_of_minutes_is_halved_too(tiny_run, limited, capsys):
    limited(12, OUT_OF_MEMORY)
    found = tiny_run(steps=None, minutes=1000, dry_run=True, quiet=False).config
    assert "does not fit in memory: continuing with --accumulation 2" in capsys.readouterr().out
    assert found.accumulation == 2
    limited(16, OUT_OF_MEMORY)
    found = tiny_run("open", steps=None, batch_size=None, accumulation=1, minutes=1000, dry_run=True).config
    assert (found.batch_size, found.accumulation) == (32, 2)


def test_the_first_step_itself_is_halved_too(tiny_run, monkeypatch):
    from crate_mae.training import loop

    plain, failures = loop.training_step, [OUT_OF_MEMORY]

    def step(*args, **kwargs):
        if failures:
            raise failures.pop()
        return plain(*args, **kwargs)

    monkeypatch.setattr(loop, "training_step", step)
    run = tiny_run(steps=3)
    assert run.config.accumulation == 2
    assert len(run.metrics()) == len(tiny_run("other", steps=3, accumulation=2).metrics())
    log = (run.path / "log.txt").read_text()
    assert "End: the first step did not fit in memory." in log and "was killed" not in log


def test_the_peak_of_a_run_is_not_that_of_what_ran_before(tiny_run):
    def fill():
        torch.ones(2**27)  # 512 MiB, freed at once
        return peak_memory()

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("This system does not let a process forget its peak of memory.")
    assert fill() - restart_peak() >= 2**28
    before = fill()
    tiny_run(steps=2)
    assert peak_memory() < before - 2**28


def test_the_halved_step_is_judged_and_built_as_it_will_be_taken(tiny_run, limited, monkeypatch):
    judged = []
    monkeypatch.setattr("crate_mae.training.start.refuse_too_large", lambda task, _: judged.append(task.config))
    limited(12, OUT_OF_MEMORY)
    run = tiny_run(steps=3)
    assert [config.accumulation for config in judged] == [1, 2]
    assert run.config.accumulation == 2


def test_what_does_not_fit_when_halved_stops_with_one_sentence(tiny_run, limited, tmp_path):
    limited(8, OUT_OF_MEMORY)
    with pytest.raises(UserError, match="does not fit in memory with 12 images at a time: give a larger"):
        tiny_run()
    assert not (tmp_path / "run").exists()


def test_one_image_at_a_time_cannot_be_halved(tiny_run, limited):
    limited(0, OUT_OF_MEMORY)
    with pytest.raises(UserError, match="with 1 images at a time"):
        tiny_run(batch_size=4, accumulation=4)


def test_other_errors_and_later_steps_are_left_alone():
    with pytest.raises(RuntimeError, match="shape"), first_step():
        raise RuntimeError("shape mismatch")
    with pytest.raises(torch.OutOfMemoryError), first_step(is_first=False):
        raise OUT_OF_MEMORY
    with pytest.raises(StepTooLargeError), first_step():
        raise OUT_OF_MEMORY


def test_a_batch_that_cannot_fit_is_refused_before_the_first_step(tiny_run, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"0\.0 GiB are free: give a smaller --model"):
        monkeypatch.setattr(preflight, "free_memory", lambda: 100_000)
        tiny_run(batch_size=128)
    monkeypatch.setattr(preflight, "free_memory", lambda: 6_000_000)
    with pytest.raises(UserError, match=r"needs at least .* GiB of memory, but .* give --accumulation") as refusal:
        tiny_run(batch_size=128)
    assert not (tmp_path / "run").exists()
    words = str(refusal.value).split()
    accumulation = int(words[words.index("--accumulation") + 1].rstrip(","))
    largest = int(words[words.index("--batch-size") + 1].rstrip("."))
    assert 128 // accumulation <= largest < 128 // (accumulation // 2)
    tiny_run(batch_size=128, accumulation=accumulation, steps=2)
    tiny_run("smaller", batch_size=largest, steps=2)
    with pytest.raises(UserError, match="needs at least"):
        tiny_run("larger", batch_size=largest + 1, steps=2)


def test_what_is_kept_is_what_autograd_saves():
    weight, x = torch.nn.Parameter(torch.randn(3, 5)), torch.randn(7, 3)
    kept = preflight.kept_bytes(lambda: (x @ weight).relu().sum(), [weight])
    assert kept == 4 * (7 * 3 + 7 * 5)  # the input of the product, the output of the ReLU


def test_images_that_are_mixed_in_pairs_are_halved_in_pairs(tiny_finetuning, monkeypatch, tmp_path):
    plain = Classifier.forward

    def forward(self, x):
        if self.training and len(x) > 4:
            raise OUT_OF_MEMORY
        return plain(self, x)

    monkeypatch.setattr(Classifier, "forward", forward)
    assert tiny_finetuning(batch_size=8, steps=2).config.accumulation == 2
    with pytest.raises(UserError, match="with 6 images at a time"):
        tiny_finetuning("odd", batch_size=6, steps=2)
    assert not (tmp_path / "odd").exists()
    monkeypatch.setattr(preflight, "free_memory", lambda: 3_000_000)
    with pytest.raises(UserError, match="needs at least") as refusal:
        tiny_finetuning("large", batch_size=252)
    words = str(refusal.value).split()
    accumulation = int(words[words.index("--accumulation") + 1].rstrip(","))
    assert 252 % (2 * accumulation) == 0
    assert int(words[words.index("--batch-size") + 1].rstrip(".")) % 2 == 0


def test_processes_of_one_machine_share_its_memory(tiny_run, monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda: 100_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "30")
    with pytest.raises(UserError, match=r"are free for each of 30 processes: give"):
        tiny_run(batch_size=128)
