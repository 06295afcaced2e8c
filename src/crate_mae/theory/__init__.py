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

from crate_mae.theory.attention import attention_membership as attention_membership
from crate_mae.theory.attention import linear_ssa as linear_ssa
from crate_mae.theory.attention import mssa as mssa
from crate_mae.theory.attention import ssa as ssa
from crate_mae.theory.coding_rate import coding_rate as coding_rate
from crate_mae.theory.coding_rate import coding_rate_gradient as coding_rate_gradient
from crate_mae.theory.coding_rate import moment_coding_rate as moment_coding_rate
from crate_mae.theory.coding_rate import official_subspace_coding_rate as official_subspace_coding_rate
from crate_mae.theory.coding_rate import projected_coding_rate as projected_coding_rate
from crate_mae.theory.coding_rate import rate_reduction as rate_reduction
from crate_mae.theory.coding_rate import sparse_rate_reduction as sparse_rate_reduction
from crate_mae.theory.coding_rate import structured_diffusion as structured_diffusion
from crate_mae.theory.coding_rate import subspace_coding_rate as subspace_coding_rate
from crate_mae.theory.coding_rate import subspace_coding_rate_gradient as subspace_coding_rate_gradient
from crate_mae.theory.compression import balance as balance
from crate_mae.theory.compression import balanced_membership as balanced_membership
from crate_mae.theory.compression import balanced_ssa as balanced_ssa
from crate_mae.theory.compression import compression_step as compression_step
from crate_mae.theory.compression import decompression_step as decompression_step
from crate_mae.theory.compression import symmetric_membership as symmetric_membership
from crate_mae.theory.measures import effective_rank as effective_rank
from crate_mae.theory.measures import gini as gini
from crate_mae.theory.measures import isometry_error as isometry_error
from crate_mae.theory.measures import l1_to_l2 as l1_to_l2
from crate_mae.theory.measures import mutual_coherence as mutual_coherence
from crate_mae.theory.measures import participation_ratio as participation_ratio
from crate_mae.theory.measures import token_diversity as token_diversity
from crate_mae.theory.measures import zero_fraction as zero_fraction
from crate_mae.theory.mixtures import MixtureSample as MixtureSample
from crate_mae.theory.mixtures import mixture_denoiser as mixture_denoiser
from crate_mae.theory.mixtures import mixture_log_density as mixture_log_density
from crate_mae.theory.mixtures import mixture_membership as mixture_membership
from crate_mae.theory.mixtures import sample_mixture as sample_mixture
from crate_mae.theory.sparse_coding import SingularPair as SingularPair
from crate_mae.theory.sparse_coding import apply_ista_operator as apply_ista_operator
from crate_mae.theory.sparse_coding import bounded_dictionary as bounded_dictionary
from crate_mae.theory.sparse_coding import ista_from_zero as ista_from_zero
from crate_mae.theory.sparse_coding import ista_operator as ista_operator
from crate_mae.theory.sparse_coding import ista_step as ista_step
from crate_mae.theory.sparse_coding import lasso_objective as lasso_objective
from crate_mae.theory.sparse_coding import scaled_gram as scaled_gram
from crate_mae.theory.sparse_coding import sparse_codes as sparse_codes
from crate_mae.theory.sparse_coding import top_singular_pair as top_singular_pair
from crate_mae.theory.subspaces import affinity as affinity
from crate_mae.theory.subspaces import best_subspace_energy as best_subspace_energy
from crate_mae.theory.subspaces import coherence as coherence
from crate_mae.theory.subspaces import distance_from_orthogonal as distance_from_orthogonal
from crate_mae.theory.subspaces import match_up_to_scale as match_up_to_scale
from crate_mae.theory.subspaces import nearest_orthogonal as nearest_orthogonal
from crate_mae.theory.subspaces import newton_schulz as newton_schulz
from crate_mae.theory.subspaces import orthonormal_bases as orthonormal_bases
from crate_mae.theory.subspaces import orthonormalised as orthonormalised
from crate_mae.theory.subspaces import orthonormality_error as orthonormality_error
from crate_mae.theory.subspaces import polar_factor as polar_factor
from crate_mae.theory.subspaces import principal_cosines as principal_cosines
from crate_mae.theory.subspaces import project as project
from crate_mae.theory.subspaces import retraction as retraction
from crate_mae.theory.subspaces import signal_to_noise as signal_to_noise
from crate_mae.theory.subspaces import unproject as unproject
