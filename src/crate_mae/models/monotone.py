"""Layers whose compression and sparse coding are theorems about the module, for every weight and every token.

    encoder layer    X = LN(Z)           Z_half = X + Compression(X)          Z_next = BoundedISTA(LN(Z_half))
    decoder layer    X = LN(LN(Y) E^T)   Y_next = X - Compression(X)

`Compression` is sum_k kappa_k (B_k W_k - W_k) U_k^T with W_k = X U_k, U = [U_1 .. U_h] orthogonal, ||B_k||_2 <= 1 and
0 < kappa_k < 1, so that R^c(Z_half | U) <= R^c(X | U) (`theory.compression`). `BoundedISTA` is one proximal-gradient
step from the all-zero code with eta ||D||_2^2 <= 1, so that its code never has a larger lasso objective than no code at
all (`theory.sparse_coding`). The decoder takes the compression with the opposite sign: no rate falls.

What differs from the published layer: the step starts from X instead of Z and has its term -W_k; the output projection
is U_k; the attention is balanced; the sizes kappa_k and inverse temperatures s_k are learned, one per head; sparse
coding starts from 0 instead of X. There are two d x d matrices to a layer instead of three.

**How the guarantees are kept.** They belong to the module, not to an optimizer (a loop that compiles or shards layers
calls `retract_` after each step, as ours does). U: before it is used in training, a
parameter that has been changed is drawn back towards the orthogonal matrices by one Newton-Schulz step, in place; at
rest (`eval()`) its exact polar factor is used. D: divided by its norm in the forward pass, where need be. kappa and s:
a sigmoid and an exponential of the parameters.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, distribute_tensor

from crate_mae.errors import UserError
from crate_mae.models.layers import ISTA, DecoderLayer, Dictionary, EncoderLayer
from crate_mae.theory.compression import balanced_membership, balanced_ssa
from crate_mae.theory.sparse_coding import SingularPair, bounded_dictionary, top_singular_pair
from crate_mae.theory.subspaces import nearest_orthogonal, newton_schulz


class OrthogonalSubspaces(nn.Module):
    """A square orthogonal matrix U = [U_1 .. U_h]: the bases of subspaces that are orthogonal to each other.

    The loss does not see how far `weight` is from orthogonal, only the orthogonal matrix near it. Its gradient is that
    of U, passed on as it is; what an optimizer's step adds beyond the orthogonal matrices is taken away again by the
    next forward pass, wherever the weights come from (any optimizer, an average, a file). In training that is one
    Newton-Schulz step, at a cost of 4 d^3 operations, which leaves ||U^T U - I|| at about 3/4 of the square of what it
    was. In `eval()` it is the exact polar factor, kept until the weight changes.

    Attributes:
        weight: U^T before it is made orthogonal, d x d, as the weight of a linear map.
        retracts_itself: whether the forward pass in training draws the parameter back. A training loop may rather call
            `retract_` after every step of its optimizer, as ours does: a pass cannot write into a parameter of which
            its process holds a share (FSDP), or which is compiled.
    """

    def __init__(self, embed_dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim, device=device, dtype=dtype))
        self.retracts_itself = True
        self._retracted: Tensor | None = None  # the weight that training left after drawing it back
        self._polar: tuple[Tensor, Tensor] | None = None  # a weight, and its polar factor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniformly distributed orthogonal matrix."""
        _draw_orthogonal(self.weight)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """[X U_1 .. X U_h]."""
        return F.linear(x, self.matrix())

    def back(self, w: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """sum_k W_k U_k^T, from [W_1 .. W_h]."""
        return F.linear(w, self.matrix().mT)

    def matrix(self) -> Float[Tensor, "d d"]:
        """U^T, orthogonal: in training up to the error of one Newton-Schulz step, at rest to working precision."""
        if not self.training or not self.weight.requires_grad:
            return _as_if(self.weight, self._at_rest())
        if self.retracts_itself and _is_traced(self.weight):
            return _as_if(self.weight, _one_step(self.weight))
        if self.retracts_itself:
            self._retract_if_changed()
        return self.weight

    @torch.no_grad()
    def retract_(self) -> None:
        """Draw the parameter itself towards the orthogonal matrices by one Newton-Schulz step.

        Of a parameter that is cut among processes (FSDP), all must call this together.
        """
        weight = self.weight
        if isinstance(weight, DTensor):
            u = _one_step(weight.full_tensor())
            # Without a source rank nothing is sent: each process cuts its share out of its own copy.
            weight.copy_(distribute_tensor(u, weight.device_mesh, weight.placements, src_data_rank=None))
        else:
            weight.copy_(_one_step(weight))

    @torch.no_grad()
    def _retract_if_changed(self) -> None:
        """One step, once for each change of the weight, so that a graph of an earlier pass stays valid.

        Numbers are compared: PyTorch's fused AdamW changes them without a new version of the tensor.
        """
        if not _is_same(self._retracted, self.weight):
            self.weight.copy_(_one_step(self.weight))
            self._retracted = self.weight.detach().clone()

    def _at_rest(self) -> Float[Tensor, "d d"]:
        if _is_traced(self.weight):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return newton_schulz(self.weight, steps=20)
        polar = self._polar  # of this call, whatever other threads do
        if polar is None or not _is_same(polar[0], self.weight):
            with torch.inference_mode(False), torch.no_grad():  # what is kept will be used outside that mode, too
                weight = self.weight.clone()
                polar = self._polar = weight, nearest_orthogonal(weight)
        return polar[1]


class Compression(nn.Module):
    """The compressing step sum_k kappa_k (B_k W_k - W_k) U_k^T, W_k = X U_k: what an encoder layer adds to X.

    B_k is `theory.compression.balanced_membership` of W_k with inverse temperature s_k.

    Attributes:
        subspaces: U.
        num_heads: number of subspaces h; the subspace dimension is p = d / h.
        rate_logit: kappa_k = sigmoid(rate_logit[k]), one per head; 1/2 at first.
        log_scale: s_k = exp(log_scale[k]), one per head; p^-1/2 at first, as in the published layer.
    """

    orthogonal: ClassVar[type[OrthogonalSubspaces]] = OrthogonalSubspaces

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"The width {embed_dim} cannot be split into {num_heads} heads of equal dimension.")
        self.num_heads = num_heads
        self.subspaces = self.orthogonal(embed_dim, device=device, dtype=dtype)
        self.rate_logit = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kappa = 1/2 and s = p^-1/2; the subspaces reset themselves."""
        nn.init.zeros_(self.rate_logit)
        nn.init.constant_(self.log_scale, -0.5 * math.log(len(self.subspaces.weight) / self.num_heads))

    def bases(self) -> Float[Tensor, "h d p"]:
        """The subspace bases U_k."""
        return self.subspaces.matrix().unflatten(0, (self.num_heads, -1)).mT

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The step from the tokens X."""
        w = self.project(x)
        return self.step(w, balanced_ssa(w, self.scale()))

    def project(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n p"]:
        """W_k = X U_k for all subspaces."""
        return self.subspaces(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def membership(self, w: Float[Tensor, "b h n p"]) -> Float[Tensor, "b h n n"]:
        """B_k: how much of which token each token takes up."""
        return balanced_membership(w, self.scale())

    def step(self, w: Float[Tensor, "b h n p"], mixed: Float[Tensor, "b h n p"]) -> Float[Tensor, "b n d"]:
        """sum_k kappa_k (B_k W_k - W_k) U_k^T from the tokens' projections W_k, unmixed and mixed."""
        change = self.rate() * (mixed - w)
        return self.subspaces.back(change.transpose(1, 2).flatten(2))

    def rate(self) -> Float[Tensor, "h 1 1"]:
        """kappa, from 0 to 1."""
        return torch.sigmoid(self.rate_logit)[:, None, None]

    def scale(self) -> Float[Tensor, "h 1 1"]:
        """s, positive and at most `MOST_SCALE`; in float32 at least."""
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return torch.exp(log_scale.clamp(-_MOST_LOG_SCALE, _MOST_LOG_SCALE))[:, None, None]

    def extra_repr(self) -> str:
        """Width and heads, for `print(model)`."""
        return f"{len(self.subspaces.weight)}, num_heads={self.num_heads}"


class BoundedISTA(ISTA):
    """One proximal-gradient step on the lasso from the all-zero code, in a dictionary of bounded norm.

        A = relu(eta X D' - eta lambda),   D' = D / max(1, sqrt(eta) ||D||_2)

    F(A) <= F(0) for every X and D: `theory.sparse_coding.bounded_dictionary`. D starts orthogonal, at the bound, where
    A is the exact minimum of the lasso over A >= 0. In `eval()` the norm is exact. In training it is an estimate from
    below, by `POWER_ITERATIONS` steps of the power method: up to 7% too low for Gaussian D of widths 64 to 768. The
    step descends while it is less than 29% too low (1 - 1/sqrt(2)), which a D whose top direction is orthogonal to the
    method's start would not be.

    Attributes:
        dictionary: D, d x d, before it is scaled.
        step_size: eta.
        threshold: lambda, the weight of the l1 norm.
    """

    POWER_ITERATIONS: ClassVar[int] = 8
    _pair: tuple[Tensor, SingularPair] | None = None  # a dictionary, and its largest singular value's directions

    def reset_parameters(self) -> None:
        """Orthogonal, scaled to eta ||D||_2^2 = 1."""
        _draw_orthogonal(self.dictionary, gain=self.step_size**-0.5)

    def operator(self) -> Float[Tensor, "d d"]:
        """Eta D', of which the code is relu(X (eta D') - eta lambda)."""
        return self.step_size * self.lasso_dictionary()

    def lasso_dictionary(self) -> Float[Tensor, "d d"]:
        """D'."""
        u, v = top_singular_pair(self.dictionary, self.POWER_ITERATIONS) if self.training else self._pair_at_rest()
        return bounded_dictionary(self.dictionary, self.step_size, u @ (self.dictionary @ v))

    def _pair_at_rest(self) -> SingularPair:
        if _is_traced(self.dictionary):
            return top_singular_pair(self.dictionary, 10 * self.POWER_ITERATIONS)
        pair = self._pair  # of this call, whatever other threads do
        if pair is None or not _is_same(pair[0], self.dictionary):
            with torch.inference_mode(False), torch.no_grad():  # what is kept will be used outside that mode, too
                dictionary = self.dictionary.clone()
                pair = self._pair = dictionary, top_singular_pair(dictionary)
        return pair[1]


class MonotoneEncoderLayer(EncoderLayer):
    """Compress, then sparsify, and neither can fail: X = LN(Z); Z_half = X + Compression(X); BoundedISTA(LN(Z_half)).

    With stochastic depth a layer's step is left out of some images and is not enlarged in the others, since kappa must
    stay below 1.
    """

    attention: ClassVar[Any] = Compression
    sparse_coding: ClassVar[Any] = BoundedISTA
    theorems: ClassVar[frozenset[str]] = frozenset({"compress", "lasso_zero"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        step_size: float = 0.1,
        threshold: float = 0.5,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.ista_skip = False
        self.norm1 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.attn = self.attention(embed_dim, num_heads, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path, scale_by_keep=False)
        self.norm2 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.ista = self.sparse_coding(embed_dim, step_size=step_size, threshold=threshold, device=device, dtype=dtype)

    def step_start(self, z: Float[Tensor, "b n d"], x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the attention step is added to, of the tokens Z and X = LN(Z): X, of which it lowers R^c."""
        del z
        return x


class MonotoneDecoderLayer(DecoderLayer):
    """The way back: X = LN(LN(Y) E^T); Y_next = X - Compression(X), which lowers no rate."""

    theorems: ClassVar[frozenset[str]] = frozenset({"decompress"})

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        nn.Module.__init__(self)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.dictionary = Dictionary(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.attn = Compression(embed_dim, num_heads)

    def step_start(self, y_half: Float[Tensor, "b n d"], x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the attention step is taken from, of the tokens Y_half and X = LN(Y_half): X."""
        del y_half
        return x


def _one_step(weight: Tensor) -> Tensor:
    """One Newton-Schulz step, in the precision of the weight also under autocast."""
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return newton_schulz(weight)


@torch.no_grad()
def _draw_orthogonal(parameter: Tensor, gain: float = 1.0) -> None:
    """Draw a uniformly distributed orthogonal matrix; in float32, since half precisions have no QR decomposition."""
    if not parameter.is_meta:
        drawn = torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        parameter.copy_(nn.init.orthogonal_(drawn, gain=gain))


def _is_same(kept: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor still has the numbers, precision and device that it had."""
    if kept is None or (kept.dtype, kept.device) != (tensor.dtype, tensor.device):
        return False
    return torch.equal(kept, tensor)


def _is_traced(tensor: Tensor) -> bool:
    """Whether the forward pass is being traced, so that values are not available: by a compiler, or of shapes alone."""
    return torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)


def _as_if(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`; its gradient passes straight through to `parameter`."""
    return value + (parameter - parameter.detach()) if torch.is_grad_enabled() else value


def retract_(model: nn.Module) -> None:
    """Draw all subspaces back towards the orthogonal matrices, from now on instead of their own forward passes.

    For training loops, after every step of the optimizer.
    """
    for module in model.modules():
        if isinstance(module, OrthogonalSubspaces):
            module.retracts_itself = False
            module.retract_()


def orthogonal_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are kept orthogonal, of which weight decay would only take away length."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, OrthogonalSubspaces)}


def check_monotone(model: nn.Module) -> None:
    """Raise a `UserError` for weights with which a monotone layer could not keep its promise.

    Subspaces that are far from orthogonal, and inverse temperatures that overflow, are named with their layer.
    """
    for name, module in model.named_modules():
        if not isinstance(module, Compression):
            continue
        if not bool((module.log_scale.detach().float() <= _MOST_LOG_SCALE).all()):
            raise UserError(
                f"{name}.log_scale is {float(module.log_scale.detach().max()):.3g} at most, an inverse temperature "
                f"beyond {MOST_SCALE:g}: attention cannot be computed with it.\n"
                "Training has run away: take an earlier checkpoint of the run."
            )
        try:
            nearest_orthogonal(module.subspaces.weight.detach())
        except UserError as error:
            raise UserError(f"{name}.subspaces: {error}") from error


MOST_SCALE = 1e4  # of the inverse temperature; trained ones are near p^-1/2, and logits stay far from overflow
_MOST_LOG_SCALE = math.log(MOST_SCALE)
