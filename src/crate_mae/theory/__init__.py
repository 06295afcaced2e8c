"""The mathematics of CRATE-MAE: one equation, one pure function.

Tokens are **rows** everywhere: `z` is an n x d matrix of n tokens, where the papers write Z as d x n with tokens as
columns. Every formula here is the transpose of the papers', once and for all: their U_k^T Z is our Z U_k.

| symbol | argument          | shape          | meaning                                                      |
|--------|-------------------|----------------|--------------------------------------------------------------|
| Z      | `z`               | `*batch n d`   | tokens                                                       |
| U_k    | `u[k]`            | `h d p`        | basis of subspace k: p columns in R^d, orthonormal in theory |
| W_k    | `w[..., k, :, :]` | `*batch h n p` | projections W_k = Z U_k, what an attention head works on     |
| D      | `dictionary`      | `d d`          | dictionary; codes A rebuild tokens as A D^T                  |
| eps    | `eps`             | number         | the distortion epsilon itself; the functions square it       |
| eta    | `step_size`       | number         | step of one proximal-gradient (ISTA) iteration               |
| lambda | `threshold`       | number         | weight of the l1 norm in the lasso                           |

Read `coding_rate` (what is optimised), then `attention` (its gradient becomes attention), then `sparse_coding`, then
`compression` (an attention step that provably lowers the rate, as the gradient step should).

Papers: "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129, extended in 2311.13110) and "Masked
Completion via Structured Diffusion with White-Box Transformers" (arXiv 2404.02446).
"""

from crate_mae.theory.attention import attention_membership, linear_ssa, mssa, ssa
from crate_mae.theory.coding_rate import (
    coding_rate,
    coding_rate_gradient,
    moment_coding_rate,
    official_subspace_coding_rate,
    projected_coding_rate,
    rate_reduction,
    sparse_rate_reduction,
    structured_diffusion,
    subspace_coding_rate,
    subspace_coding_rate_gradient,
)
from crate_mae.theory.compression import (
    balance,
    balanced_membership,
    balanced_ssa,
    compression_step,
    decompression_step,
    symmetric_membership,
)
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
from crate_mae.theory.mixtures import (
    MixtureSample,
    mixture_denoiser,
    mixture_log_density,
    mixture_membership,
    sample_mixture,
)
from crate_mae.theory.sparse_coding import (
    SingularPair,
    apply_ista_operator,
    bounded_dictionary,
    ista_from_zero,
    ista_operator,
    ista_step,
    lasso_objective,
    scaled_gram,
    sparse_codes,
    top_singular_pair,
)
from crate_mae.theory.subspaces import (
    affinity,
    best_subspace_energy,
    coherence,
    distance_from_orthogonal,
    match_up_to_scale,
    nearest_orthogonal,
    newton_schulz,
    orthonormal_bases,
    orthonormalised,
    orthonormality_error,
    polar_factor,
    principal_cosines,
    project,
    retraction,
    signal_to_noise,
    unproject,
)

__all__ = [
    "MixtureSample",
    "SingularPair",
    "affinity",
    "apply_ista_operator",
    "attention_membership",
    "balance",
    "balanced_membership",
    "balanced_ssa",
    "best_subspace_energy",
    "bounded_dictionary",
    "coding_rate",
    "coding_rate_gradient",
    "coherence",
    "compression_step",
    "decompression_step",
    "distance_from_orthogonal",
    "effective_rank",
    "gini",
    "isometry_error",
    "ista_from_zero",
    "ista_operator",
    "ista_step",
    "l1_to_l2",
    "lasso_objective",
    "linear_ssa",
    "match_up_to_scale",
    "mixture_denoiser",
    "mixture_log_density",
    "mixture_membership",
    "moment_coding_rate",
    "mssa",
    "mutual_coherence",
    "nearest_orthogonal",
    "newton_schulz",
    "official_subspace_coding_rate",
    "orthonormal_bases",
    "orthonormalised",
    "orthonormality_error",
    "participation_ratio",
    "polar_factor",
    "principal_cosines",
    "project",
    "projected_coding_rate",
    "rate_reduction",
    "retraction",
    "sample_mixture",
    "scaled_gram",
    "signal_to_noise",
    "sparse_codes",
    "sparse_rate_reduction",
    "ssa",
    "structured_diffusion",
    "subspace_coding_rate",
    "subspace_coding_rate_gradient",
    "symmetric_membership",
    "token_diversity",
    "top_singular_pair",
    "unproject",
    "zero_fraction",
]
