import pytest

from crate_mae.training.optimizer import scaled_lr, warmup_cosine


def test_learning_rate_is_proportional_to_the_batch():
    assert scaled_lr(1.5e-4, 256) == 1.5e-4
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.1 + 0.9 * (1 + 2**-0.5) / 2), (8, 0.55), (12, 0.1)],
)
def test_warmup_is_linear_and_then_comes_half_a_cosine(step, expected):
    assert warmup_cosine(step, total_steps=12, warmup_steps=4, peak_lr=1.0, final_lr=0.1) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_peak():
    assert warmup_cosine(0, 7, 0, 3e-4, 0.0) == 3e-4
