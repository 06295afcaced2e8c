r"""Rates of the tokens of all images together, from their second moments alone.

The tokens of one image are fewer than the dimensions of a layer, so that R of an image is capped at n directions while
R^c counts p directions in each of h subspaces: R - R^c of an image means little. The tokens of many images fill the
space. Their rates are those of the moment M = Z^T Z / n (`theory.coding_rate.moment_coding_rate`):

    R = 1/2 logdet(I + d/eps^2 M),    R^c = 1/2 sum_k logdet(I + p/eps^2 Q_k^T M Q_k),

with orthonormal bases Q_k of the layer's subspaces, so that no scale of U_k enters. Moments of groups of images add up,
which gives a jackknife: everything here holds the moments of all groups first, then without each of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.interpret.audit import NO_CHANGE, RELU, SHRINKING, UNIFORM, Measured, margins_over
from crate_mae.interpret.layer_measures import EPS
from crate_mae.theory.coding_rate import moment_coding_rate

_DOUBLINGS, _HALVINGS = 40, 26  # of a bisection: to 1e-8 of the factor


class Pool(NamedTuple):
    """Moments of the tokens of all images, then without each group of images.

    Attributes:
        whole: M.
        inside: Q_k^T M Q_k.
    """

    whole: Float[Tensor, "r d d"]
    inside: Float[Tensor, "r h p p"]

    def rate(self) -> Float[Tensor, "r"]:
        """R."""
        return moment_coding_rate(self.whole, EPS)

    def subspace_rate(self) -> Float[Tensor, "r"]:
        """R^c."""
        return moment_coding_rate(self.inside, EPS).sum(-1)

    def scaled(self, b: Float[Tensor, "r"]) -> "Pool":
        """B M."""
        return Pool(b[:, None, None] * self.whole, b[:, None, None, None] * self.inside)

    def plus(self, other: "Pool") -> "Pool":
        """The sum of two."""
        return Pool(self.whole + other.whole, self.inside + other.inside)


def token_sum(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "d d"]:
    """Z^T Z of all tokens of some images, in float64."""
    z = tokens.flatten(0, 1).double()
    return z.mT @ z


def mean_sum(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "d d"]:
    """The same after every token was replaced by the mean token of its image."""
    z = tokens.double().mean(1)
    return tokens.shape[1] * z.mT @ z


def pool(sums: Sequence[Float[Tensor, "d d"]], counts: Float[Tensor, "g"], q: Float[Tensor, "h d p"]) -> Pool:
    """The moments of groups of images, from their sums and numbers of tokens; of a single group, without replicates."""
    groups = torch.stack(list(sums))
    products = (groups @ q.transpose(0, 1).flatten(1)).unflatten(-1, (q.shape[0], q.shape[2])).transpose(1, 2)
    return Pool(_replicates(groups, counts), _replicates(q.mT @ products, counts))


def reduction(before: Pool, after: Pool, relu: Pool | None) -> Measured:
    """R - R^c before and after a step, against no change and, where there is such a control, relu(x)."""
    start, end = (found.rate() - found.subspace_rate() for found in (before, after))
    controls = {NO_CHANGE: start} | ({} if relu is None else {RELU: relu.rate() - relu.subspace_rate()})
    return Measured(start, end, margins_over(1, end, controls), before.rate())


def sorting(before: Pool, means: Pool, after: Pool) -> Measured:
    r"""By how much R falls less in a step than in two moves that sort nothing, at the step's own R^c.

    Both multiply a moment by b >= 0: all of it, or that of the tokens' differences from the mean token of their image:

        plain shrinking:    M(b) = b M,
        uniform attention:  M(b) = b (M - M_mean) + M_mean,    Z <- (1 - a) Z + a 1 1^T Z / n with b = (1 - a)^2.

    R^c rises with b in both, and b is found by bisection. A step that does not lower R^c does not sort: against "no
    change", its margin is the fall of R^c itself.

    Args:
        before: the tokens before the step.
        means: each of them replaced by the mean token of its image.
        after: the tokens after the step.
    """
    target = after.subspace_rate()
    nothing, minus = torch.zeros_like(target), -torch.ones_like(target)
    averaged = _with_subspace_rate(before.plus(means.scaled(minus)), means, target)
    shrunk = _with_subspace_rate(before, means.scaled(nothing), target)
    start, end = before.rate(), after.rate()
    controls = {UNIFORM: averaged.rate(), SHRINKING: shrunk.rate()}
    margins = {NO_CHANGE: before.subspace_rate() - target} | margins_over(1, end, controls)
    return Measured(start, end, margins, start)


def _replicates(sums: Float[Tensor, "g *shape"], counts: Float[Tensor, "g"]) -> Float[Tensor, "r *shape"]:
    """Means over all groups, then without each."""
    counts = counts.view(-1, *[1] * (sums.ndim - 1))
    whole, count = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
    if len(sums) < 2:
        return whole / count
    return torch.cat([whole / count, (whole - sums) / (count - counts)])


def _with_subspace_rate(varied: Pool, fixed: Pool, target: Float[Tensor, "r"]) -> Pool:
    """The pool b `varied` + `fixed` whose R^c is the target, b >= 0; b = 0 where even that has a larger R^c."""

    def is_low(b: Tensor) -> Tensor:
        inside = b[:, None, None, None] * varied.inside + fixed.inside
        return moment_coding_rate(inside, EPS).sum(-1) < target

    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(_DOUBLINGS):
        if not (grows := is_low(high)).any():
            break
        high = torch.where(grows, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = is_low(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return varied.scaled(high).plus(fixed)
