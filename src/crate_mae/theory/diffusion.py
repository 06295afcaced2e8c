r"""Structured diffusion: descend the subspace rate and tokens take on structure; climb it and they lose it again.

    forward, an encoder's step:   Z <- Z - kappa grad R^c(Z | U)
    reverse, a decoder's step:    Z <- Z + kappa grad R^c(Z | U)

The gradient of R^c over many tokens at once multiplies them all by one matrix, so it cannot tell which token is of
which subspace. Over each token alone, `together=False`, it is 1/2 sum_k log(1 + p/eps^2 ||U_k^T z||^2) that descends,
whose gradient is weak along the subspace where the token has most of its energy, and strong along the others.
Source: arXiv 2404.02446, section 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.theory.coding_rate import subspace_coding_rate_gradient


def structured_diffusion(
    z: Float[Tensor, "n d"],
    u: Float[Tensor, "h d p"],
    *,
    step_size: float,
    steps: int,
    eps: float = 0.5,
    together: bool = True,
) -> Float[Tensor, "t n d"]:
    r"""Z_0, ..., Z_steps with Z_{l+1} = Z_l - kappa grad R^c(Z_l | U); a negative kappa runs the reverse.

    Args:
        z: tokens Z_0.
        u: subspace bases U_k.
        step_size: kappa; above 0 structures the tokens, below 0 undoes it.
        steps: how many steps.
        eps: distortion; the formula squares it.
        together: the rate of all tokens at once, or the sum of the rates of each token alone.

    Raises:
        UserError: if there is no step to take.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: give at least 1.")
    path = [z]
    for _ in range(steps):
        z = path[-1]
        gradient = (
            subspace_coding_rate_gradient(z, u, eps)
            if together
            else subspace_coding_rate_gradient(z.unsqueeze(-2), u, eps).squeeze(-2)
        )
        path.append(z - step_size * gradient)
    return torch.stack(path)
