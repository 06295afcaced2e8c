"""The benchmark of guarantees runs from end to end, and leaves the layers as they were."""

import torch

from benchmarks import guarantees
from crate_mae.models.monotone import BoundedISTA, OrthogonalSubspaces


def test_the_benchmark_writes_its_table(tmp_path):
    threads = torch.get_num_threads()
    try:
        guarantees.main(["--machine", "here", "--rounds", "2", "--sizes", "nano", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("guarantees_here_*.md")
    row = path.read_text().splitlines()[-1]
    assert row.startswith("| nano | 4 | ")
    assert row.count("**") == 6


def test_unconstrained_layers_are_neither_re_orthogonalised_nor_bounded():
    torch.manual_seed(0)
    subspaces, ista = OrthogonalSubspaces(8), BoundedISTA(8)
    with torch.no_grad():
        subspaces.weight.mul_(1.1)
        ista.dictionary.mul_(2)
    with guarantees.unconstrained():
        subspaces.retract_()
        torch.testing.assert_close(torch.linalg.svdvals(subspaces.weight.detach()), torch.full((8,), 1.1))
        assert torch.equal(ista.lasso_dictionary(), ista.dictionary)
    subspaces.retract_()
    assert torch.linalg.matrix_norm(subspaces.weight.detach(), ord=2) <= 1 + 1e-6
    torch.testing.assert_close(2 * ista.lasso_dictionary(), ista.dictionary)
