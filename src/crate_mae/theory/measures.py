"""Measures of a representation, or of a dictionary, that need neither labels nor subspaces."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crate_mae.theory.derivatives import at_least_float, in_float64


def zero_fraction(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The fraction of exact zeros: the sparsity of a code, 0 when dense and 1 when nothing is active."""
    return (x == 0).mean(dtype=torch.float32)


def l1_to_l2(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    r"""||x||_1 / (sqrt(d) ||x||_2) of each row: 1 when all magnitudes are equal, d^-1/2 when one coordinate is active.

    Small is sparse, also for rows without any exact zero. A zero row counts as sparse: 0.
    """
    x = _scaled(at_least_float(x).abs(), (-1,))
    return x.sum(-1) / (torch.linalg.vector_norm(x, dim=-1).clamp_min(1) * x.shape[-1] ** 0.5)


def gini(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    r"""Gini index of the magnitudes of each row, 1 - 2 sum_i (c_i / ||x||_1) (d - i + 1/2)/d with c sorted ascending.

    0 when all magnitudes are equal, 1 - 1/d when one coordinate is active: large is sparse. Of the usual measures of
    sparsity it alone has all the properties that one would ask for: Hurley and Rickard, "Comparing measures of
    sparsity", IEEE Trans. Inf. Theory 2009. A zero row counts as sparse: 1.
    """
    c = at_least_float(x).abs().sort(dim=-1).values
    d = c.shape[-1]
    weights = (d - torch.arange(1, d + 1, dtype=c.dtype, device=c.device) + 0.5) / d
    return 1 - 2 * (c / c.sum(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny) * weights).sum(-1)


def effective_rank(z: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    r"""erank(Z) = exp(-sum_i q_i log q_i) with q_i = sigma_i / sum_j sigma_j over the singular values of Z.

    Between 1 (one direction) and min(n, d) (all directions equally used); 1 for all-zero tokens, where the formula says
    nothing. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. The tokens are taken as given: centre them
    first to disregard their mean.
    """
    sigma = torch.linalg.svdvals(at_least_float(z))
    q = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(q).sum(-1).exp()


def participation_ratio(z: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    r"""(sum_i sigma_i^2)^2 / sum_i sigma_i^4 over the singular values of Z: how many directions share its energy.

    Like `effective_rank` between 1 and min(n, d), but weak directions count less. 1 for all-zero tokens.
    """
    z = _scaled(in_float64(z), (-2, -1))
    gram = z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z
    energy, fourth = gram.diagonal(dim1=-2, dim2=-1).sum(-1).square(), gram.square().sum((-2, -1))
    return torch.where(fourth > 0, energy / torch.where(fourth > 0, fourth, 1), 1 + fourth).float()


def isometry_error(dictionary: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    r"""||D^T D - I||_F / sqrt(m): 0 exactly when the atoms are orthonormal, 1 for a zero dictionary."""
    gram = dictionary.mT @ dictionary
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(gram - identity) / len(gram) ** 0.5


def mutual_coherence(dictionary: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    r"""max_{i != j} |<d_i, d_j>| / (||d_i|| ||d_j||): 0 for orthogonal atoms, 1 when two atoms are parallel."""
    atoms = F.normalize(dictionary, dim=0)
    gram = (atoms.mT @ atoms).abs()
    return gram.masked_fill(torch.eye(len(gram), dtype=torch.bool, device=gram.device), 0).amax()


def token_diversity(z: Float[Tensor, "*batch n d"]) -> Float[Tensor, ""]:
    r"""The share of the tokens' energy in which the tokens of one image differ: sum_i ||z_i - m||^2 / sum_i ||z_i||^2.

    m is the mean token of each image; energies are summed over images before the ratio is taken. 0 when all tokens of
    an image are equal (rank collapse: the place of a patch and what it shows are lost), 1 when their mean is zero, and
    0 for all-zero tokens. It is the square of the relative residual of Dong, Cordonnier and Loukas, "Attention is not
    all you need", ICML 2021, in the Frobenius norm.
    """
    z = _scaled(at_least_float(z), tuple(range(z.ndim)))
    differences = z - z.mean(dim=-2, keepdim=True)
    return differences.square().sum() / z.square().sum().clamp_min(1)  # at least 1, or 0 for all-zero tokens


def _scaled(x: Float[Tensor, "*shape"], dim: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Numbers divided by the largest magnitude along these dimensions, so that powers neither overflow nor vanish."""
    largest = x.abs().amax(dim=dim, keepdim=True)
    return x / torch.where(largest == 0, 1, largest)
