"""Label-free measures are exact where the answer is known."""

import math

import pytest
import torch

from crate_mae.theory.measures import (
    effective_rank,
    gini,
    isometry_error,
    l1_to_l2,
    mutual_coherence,
    participation_ratio,
    token_diversity,
    zero_fraction,
)


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
    for scale in (1e-18, 1e20):
        assert token_diversity(scale * z).item() == pytest.approx(2 / 18)


def test_sparsity_of_rows_by_hand():
    x = torch.tensor([[0.0, -2.0, 0.0, 0.0, 0.0], [3.0, -3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert l1_to_l2(x).tolist() == pytest.approx([5**-0.5, 1, 0])
    assert gini(x).tolist() == pytest.approx([0.8, 0, 1], abs=1e-6)
    # Magnitudes 1, 2, 3: 1 - 2 (1 * 2.5 + 2 * 1.5 + 3 * 0.5) / (3 * 6) = 2/9.
    assert gini(torch.tensor([2.0, -3.0, 1.0])).item() == pytest.approx(2 / 9)
    assert l1_to_l2(torch.full((3,), 1e30, dtype=torch.bfloat16)).item() == pytest.approx(1, rel=1e-2)


def test_effective_ranks_of_several_matrices_are_those_of_each():
    z = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = effective_rank(z)
    assert ranks.shape == (2, 3)
    assert ranks[1, 2].item() == pytest.approx(effective_rank(z[1, 2]).item())


def test_participation_ratio_by_hand():
    # Energies 9 and 1: 10^2 / (81 + 1).
    z = torch.zeros(2, 7, 5)
    z[0, 3, 1], z[0, 4, 2] = 3, -1
    assert participation_ratio(z).tolist() == pytest.approx([100 / 82, 1])
    assert participation_ratio(1e30 * z).tolist() == pytest.approx([100 / 82, 1])
    assert participation_ratio(torch.ones(5, 7, dtype=torch.bfloat16)).item() == pytest.approx(1)
    assert participation_ratio(torch.full((5, 7), math.nan)).isnan()


def test_dictionary_measures_by_hand():
    dictionary = torch.eye(5, dtype=torch.float64)
    assert isometry_error(dictionary) == 0 and mutual_coherence(dictionary) == 0
    assert isometry_error(torch.zeros(5, 7)) == 1
    # Atoms e_1 and 2 (e_1 cos 60 + e_2 sin 60): Gram matrix [[1, 1], [1, 4]], so ||D^T D - I||^2 = 9 + 2.
    pair = torch.tensor([[1.0, 1.0], [0.0, math.sqrt(3)], [0.0, 0.0]], dtype=torch.float64)
    assert isometry_error(pair).item() == pytest.approx(math.sqrt(11 / 2))
    assert mutual_coherence(pair).item() == pytest.approx(0.5)
