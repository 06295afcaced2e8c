"""Label-free measures are exact where the answer is known."""

import pytest
import torch

from crate_mae.theory import effective_rank, token_diversity, zero_fraction


def test_zero_fraction_counts_exact_zeros():
    x = torch.tensor([[0.0, 1e-30, -0.0], [2.0, 0.0, -3.0], [1.0, 1.0, 1.0]])
    assert zero_fraction(x).item() == pytest.approx(1 / 3)
    assert zero_fraction(torch.zeros(5, 7, dtype=torch.bfloat16)) == 1


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_of_an_orthogonal_design_is_exact(rank):
    generator = torch.Generator().manual_seed(0)
    design = torch.linalg.qr(torch.randn(11, rank, generator=generator, dtype=torch.float64)).Q
    rows = torch.linalg.qr(torch.randn(7, rank, generator=generator, dtype=torch.float64)).Q
    assert effective_rank(17.0 * design @ rows.mT).item() == pytest.approx(rank, rel=1e-12)


def test_effective_rank_by_hand():
    # Singular values 3 and 1: q = (3/4, 1/4), exp(entropy) = 4 / 3^(3/4).
    z = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert effective_rank(z).item() == pytest.approx(4 / 3**0.75, rel=1e-14)


def test_effective_rank_of_nothing_is_finite():
    assert effective_rank(torch.zeros(5, 7, dtype=torch.bfloat16)) == 1


def test_token_diversity_by_hand():
    # Image 1: tokens (3, 0), (1, 0), mean (2, 0): differences 1 + 1, energy 9 + 1. Image 2: equal tokens, energy 8.
    z = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]])
    assert token_diversity(z).item() == pytest.approx(2 / 18)
    assert token_diversity(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == 1
    assert token_diversity(torch.zeros(2, 3, 5)) == 0
