"""Layers whose compression and sparse coding are guaranteed, for all weights and all tokens.

    encoder layer    X = LN(Z)           Z_half = X + Compression(X)          Z_next = BoundedISTA(LN(Z_half)), or ISTA
    decoder layer    X = LN(LN(Y) E^T)   Y_next = X - Decompression(X)

Compressing layers have the first guarantee, and the published ISTA; monotone layers have both.

`Compression` is sum_k kappa_k (B_k W_k - W_k) U_k^T with W_k = X U_k, U = [U_1 .. U_h] orthogonal, ||B_k||_2 <= 1 and
0 <= kappa_k <= 1, so that R^c(Z_half | U) <= R^c(X | U) (`theory.compression`). `BoundedISTA` is two proximal-gradient
steps from the all-zero code with eta ||D||_2^2 <= 1, so that its code never has a larger lasso objective than the
all-zero code (`theory.sparse_coding`). `Decompression` is the attention step with any kappa_k >= 0, which the decoder
takes with the opposite sign, so that no rate falls.

What differs from the published layer: the step starts from X instead of Z and has its term -W_k; the output projection
is U_k; the attention is balanced; the sizes kappa_k and inverse temperatures s_k are learned, one per head; sparse
coding starts from 0 instead of X. There are two d x d matrices to a layer instead of three.

**How the guarantees are kept.** They belong to the module, not to an optimizer. U (`OrthogonalSubspaces`): in training,
a parameter that has been changed is re-orthogonalised before it is used, in place, up to the error of a retraction; in
`eval()` its exact polar factor is used. D (`BoundedISTA`): divided by its norm in the forward pass, if necessary; the
norm is estimated from below in training, and exact in `eval()`. kappa and s: sigmoids or exponentials of parameters.

Where a graph is made of a model as it is (by a compiler, TorchScript or `torch.jit.trace`), numbers cannot decide: in
`eval()`, U is then 20 Newton-Schulz steps from the parameter, and a compiler's norm of D is 80 steps of the power
method. Exports are made of `folded()` layers, whose U and D are exact.
"""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from crate_mae.errors import UserError
from crate_mae.models.config import MONOTONE_STEPS
from crate_mae.models.layers import (
    ISTA,
    DecoderLayer,
    EncoderLayer,
    KeepsValues,
    KeptValue,
    SubspaceAttention,
    as_one_step,
    is_same,
    is_traced,
)
from crate_mae.private_torch import is_transformed
from crate_mae.theory.compression import balanced_membership, balanced_ssa, plain_balanced_ssa
from crate_mae.theory.derivatives import without_autocast
from crate_mae.theory.sparse_coding import (
    SingularPair,
    bounded_dictionary,
    ista_from_zero,
    ista_preactivation,
    scaled_gram,
    top_singular_pair,
)
from crate_mae.theory.subspaces import nearest_orthogonal, newton_schulz, retraction


class OrthogonalSubspaces(KeepsValues):
    """A square orthogonal matrix U = [U_1 .. U_h]: the bases of subspaces that are orthogonal to each other.

    The gradient of `weight` is that of U, passed on as it is; what an optimizer's step adds beyond the orthogonal
    matrices is taken away again by the next forward pass, wherever the weights come from (any optimizer, an average, a
    file). In training that is a `theory.subspaces.retraction`: one Newton-Schulz step, 4 d^3 operations, after a small
    change of U, and the exact polar factor after a large one. With the recipe `small_color`, one step lowers
    ||U^T U - I||_2 from 0.2 to 0.03. In `eval()` it is the polar factor, kept until the weight changes.

    Attributes:
        weight: U^T before it is made orthogonal, d x d, as the weight of a linear map.
        retracts_itself: whether the forward pass in training re-orthogonalises the parameter. A training loop may
            rather call `retract_` after every step of its optimizer, as ours does: a forward pass cannot write into a
            parameter that is sharded (FSDP) or compiled.
        is_folded: whether `weight` is the polar factor itself, and is used as it is.
    """

    STEPS_TO_CONVERGE: Final[int] = 20  # of Newton-Schulz, from any weight that training leaves

    def __init__(self, embed_dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim, device=device, dtype=dtype))
        self.retracts_itself = True
        self.is_folded = False
        self._retracted: Tensor | None = None  # the weight as the last re-orthogonalisation left it
        self._polar_factor = KeptValue()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniformly distributed orthogonal matrix."""
        _init_orthogonal(self.weight)

    def forward(self, x: Float[Tensor, "b n d"], u: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "b n d"]:
        # type: (Tensor, Tensor | None) -> Tensor
        """[X U_1 .. X U_h]; `u` is `matrix()` where it is known already."""
        return F.linear(x, self.matrix() if u is None else u)

    def matrix(self) -> Float[Tensor, "d d"]:
        # type: () -> Tensor
        """U^T, orthogonal: in training up to the error of a `retraction`, in `eval()` to working precision."""
        if torch.jit.is_scripting():
            return newton_schulz(self.weight, self.STEPS_TO_CONVERGE)
        else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
            if self.is_folded:
                return self.weight
            if not self.training or not self.weight.requires_grad:
                return _straight_through(self.weight, self.polar_factor())
            if self.retracts_itself and is_traced(self.weight):
                return _straight_through(self.weight, _re_orthogonalised(self.weight))
            if self.retracts_itself:
                self._retract_if_changed()
            return self.weight

    def polar_factor(self) -> Float[Tensor, "d d"]:
        """The orthogonal matrix nearest to `weight`."""
        if is_traced(self.weight):
            return _re_orthogonalised(self.weight, partial(newton_schulz, steps=self.STEPS_TO_CONVERGE))
        return self._polar_factor.of(self.weight, nearest_orthogonal)

    @torch.no_grad()
    def retract_(self) -> None:
        """Retract the parameter itself towards the orthogonal matrices.

        Of a parameter that is cut among processes (FSDP), all must call this together.
        """
        weight = self.weight
        if isinstance(weight, DTensor):
            u = _re_orthogonalised(weight.full_tensor())
            # Without a source rank nothing is sent: each process cuts its share out of its own copy.
            weight.copy_(distribute_tensor(u, weight.device_mesh, weight.placements, src_data_rank=None))
        else:
            weight.copy_(_re_orthogonalised(weight))

    @torch.no_grad()
    def _retract_if_changed(self) -> None:
        """Retract once for each change of the weight, so that a graph of an earlier pass stays valid.

        Numbers are compared: PyTorch's fused AdamW changes them without a new version of the tensor.
        """
        if not is_same(self._retracted, self.weight):
            self.weight.copy_(_re_orthogonalised(self.weight))
            self._retracted = self.weight.detach().clone()


def rate_from_half(excess_logit: Tensor) -> Tensor:
    """Kappa of an encoder's step, between 1/2 and 1; see `Compression`."""
    return 0.5 + 0.5 * torch.sigmoid(excess_logit)


class Compression(SubspaceAttention):
    """The compressing step sum_k kappa_k (B_k W_k - W_k) U_k^T, W_k = X U_k: what an encoder layer adds to X.

    B_k is `theory.compression.balanced_membership` of W_k with inverse temperature s_k. kappa_k is at least 1/2, more
    than the theorem needs: without this limit, training switches the attention of the first layer off (kappa near 0.02,
    results/monotone_layers).

    Attributes:
        subspaces: U.
        excess_logit: kappa_k = 1/2 + sigmoid(excess_logit[k]) / 2, one per head; 3/4 at first.
        log_scale: s_k = exp(log_scale[k]), one per head; p^-1/2 at first, as in the published layer.
    """

    MOST_LOG_SCALE: Final[float] = math.log(1e4)  # of what is computed with; trained s are below 3
    RATE: ClassVar[str] = "excess_logit"  # the parameter that kappa is computed from
    FIRST_RATE: ClassVar[float] = 0.0  # of that parameter
    excess_logit: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.subspaces = OrthogonalSubspaces(embed_dim, device=device, dtype=dtype)
        self.register_parameter(self.RATE, nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)))
        self.log_scale = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first kappa, and s = p^-1/2; the subspaces reset themselves."""
        nn.init.constant_(self.get_parameter(self.RATE), self.FIRST_RATE)
        nn.init.constant_(self.log_scale, -0.5 * math.log(len(self.subspaces.weight) / self.num_heads))

    def bases(self) -> Float[Tensor, "h d p"]:
        """The subspace bases U_k."""
        return self.subspaces.matrix().unflatten(0, (self.num_heads, -1)).mT

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor) -> Tensor
        """The step from the tokens X."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript reads all of a condition
            if isinstance(x, fx.Proxy):
                return as_one_step(self, x)
        u = self.subspaces.matrix()
        w = self.split(self.subspaces(x, u))
        return self.step(w, self.mix(w), u)

    def project(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n p"]:
        """W_k = X U_k for all subspaces."""
        return self.split(self.subspaces(x))

    def mix(self, w: Float[Tensor, "b h n p"]) -> Float[Tensor, "b h n p"]:
        # type: (Tensor) -> Tensor
        """B_k W_k."""
        if torch.jit.is_scripting():
            return plain_balanced_ssa(w, self.scale())
        else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
            if not self.fused_attn:
                return self.attn_drop(self.membership(w)).to(w.dtype) @ w
            return (plain_balanced_ssa if self.subspaces.is_folded else balanced_ssa)(w, self.scale())

    def membership(self, w: Float[Tensor, "b h n p"]) -> Float[Tensor, "b h n n"]:
        """B_k: how much each token takes from each other token."""
        return balanced_membership(w, self.scale())

    def step(
        self, w: Float[Tensor, "b h n p"], mixed: Float[Tensor, "b h n p"], u: Float[Tensor, "d d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        # type: (Tensor, Tensor, Tensor | None) -> Tensor
        """sum_k kappa_k (B_k W_k - W_k) U_k^T from the tokens' projections W_k, unmixed and mixed.

        `u` is `subspaces.matrix()` where it is known already.
        """
        change = self.per_head(self.rate().to(w.dtype) * (mixed - w))
        return change.transpose(1, 2).flatten(2) @ (self.subspaces.matrix() if u is None else u)

    def rate(self) -> Float[Tensor, "h 1 1"]:
        # type: () -> Tensor
        """kappa, between 1/2 and 1."""
        return rate_from_half(self.excess_logit)[:, None, None]

    def scale(self) -> Float[Tensor, "h 1 1"]:
        # type: () -> Tensor
        """s, positive and at most `MOST_SCALE`; in float32 at least."""
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return torch.exp(log_scale.clamp(-self.MOST_LOG_SCALE, self.MOST_LOG_SCALE))[:, None, None]

    @torch.no_grad()
    def folded(self) -> "Compression":
        """The same function for inference: U itself as the weight, and attention in PyTorch's own functions."""
        layer = copy.deepcopy(self).eval()
        layer.subspaces.weight.copy_(layer.subspaces.polar_factor())
        layer.subspaces.is_folded = True
        return layer

    def extra_repr(self) -> str:
        """Width and heads, for `print(model)`."""
        return f"{len(self.subspaces.weight)}, num_heads={self.num_heads}"


class Decompression(Compression):
    """The same step with any kappa_k > 0: what a decoder layer takes away from X.

    W_k becomes (1 + kappa_k) W_k - kappa_k B_k W_k; up to a factor, W_k - B_k W_k + W_k / kappa_k. The larger kappa,
    the less is left of a token but its difference from the tokens that it attends to. With kappa < 1, as in the
    encoder, completions are worse (results/monotone_layers). The first kappa is about that of the published decoder,
    whose Y_half is sqrt(2) times as long as X when training starts: 1 / (sqrt(2) - 1).

    Attributes:
        log_rate: kappa_k = exp(log_rate[k]), one per head; 2.5 at first. The others are those of `Compression`.
    """

    RATE: ClassVar[str] = "log_rate"
    FIRST_RATE: ClassVar[float] = math.log(2.5)
    log_rate: Tensor

    def rate(self) -> Float[Tensor, "h 1 1"]:
        # type: () -> Tensor
        """kappa, positive and at most `MOST_SCALE`."""
        return torch.exp(self.log_rate.clamp(-self.MOST_LOG_SCALE, self.MOST_LOG_SCALE))[:, None, None]


MOST_SCALE = math.exp(Compression.MOST_LOG_SCALE)  # of the inverse temperature, far from overflow


class BoundedISTA(ISTA):
    """Proximal-gradient steps on the lasso from the all-zero code, in a dictionary of bounded norm.

        A_1 = relu(eta X D' - eta lambda)
        A_2 = relu(A_1 + eta (X - A_1 D'^T) D' - eta lambda),   D' = D / max(1, sqrt(eta) ||D||_2)

    F(A_2) <= F(A_1) <= F(0) for every X and D: `theory.sparse_coding.bounded_dictionary`. D is initialised
    orthogonal, at the bound, where A_1 is the exact minimum of the lasso over A >= 0. After 1,000 steps of training,
    the objective is almost half below that of the all-zero code with two steps, and 9 to 22% below it with one,
    and features are better with two (results/monotone_layers).

    In `eval()` the norm is exact. In training it is an estimate from below, by `POWER_ITERATIONS` steps of the power
    method: up to 7% too low for Gaussian D of widths 64 to 768. The steps descend while it is less than 29% too low
    (1 - 1/sqrt(2)), which a D whose top direction is orthogonal to the method's start would not be.

    Attributes:
        dictionary: D, d x d, before it is scaled.
        step_size: eta.
        threshold: lambda, the weight of the l1 norm.
        steps: how many, at least 1.
    """

    POWER_ITERATIONS: ClassVar[int] = 8

    def __init__(self, embed_dim: int, *, steps: int = MONOTONE_STEPS, **options: Any) -> None:
        super().__init__(embed_dim, **options)
        self.steps = steps
        self._pair = KeptValue()  # the directions of the largest singular value

    def reset_parameters(self) -> None:
        """Orthogonal, scaled to eta ||D||_2^2 = 1."""
        _init_orthogonal(self.dictionary, gain=self.step_size**-0.5)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor) -> Tensor
        """The non-negative sparse code after `steps` steps."""
        if torch.jit.is_scripting():
            operator, gram = self.matrices()
        else:
            if isinstance(x, fx.Proxy):
                return as_one_step(self, x)
            operator, gram = self._formed(self.matrices, x, self.steps)
        return ista_from_zero(x, operator, gram, self.step_size * self.threshold, self.steps)

    def preactivation(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the code is the positive part of, in the last step."""
        operator, gram = self.matrices()
        shift = self.step_size * self.threshold
        correlation = ista_preactivation(x, operator, shift)
        if gram is None:
            return correlation
        codes = ista_from_zero(x, operator, gram, shift, self.steps - 1)
        return correlation + codes - codes @ gram

    def matrices(self) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"] | None]:
        # type: () -> tuple[Tensor, Tensor | None]
        """Eta D' and, if there is more than one step, eta D'^T D'."""
        dictionary = self.lasso_dictionary()
        return self.step_size * dictionary, scaled_gram(dictionary, self.step_size) if self.steps > 1 else None

    def operator(self) -> Float[Tensor, "d d"]:
        # type: () -> Tensor
        """Eta D'; the first code is relu(X (eta D') - eta lambda)."""
        return self.step_size * self.lasso_dictionary()

    def lasso_dictionary(self) -> Float[Tensor, "d d"]:
        # type: () -> Tensor
        """D'."""
        if torch.jit.is_scripting():
            norm = torch.linalg.matrix_norm(self.dictionary, ord=2)
            return bounded_dictionary(self.dictionary, self.step_size, norm)
        else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
            u, v = self._top_singular_pair()
            return bounded_dictionary(self.dictionary, self.step_size, u @ (self.dictionary @ v))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The same function for inference, with its matrices as weights."""
        return super().folded() if self.steps == 1 else FoldedISTA(self)

    def extra_repr(self) -> str:
        """Width, step size, threshold and steps, for `print(model)`."""
        return f"{super().extra_repr()}, steps={self.steps}"

    def _top_singular_pair(self) -> SingularPair:
        dictionary = self.dictionary.detach()
        if self.training:
            return top_singular_pair(dictionary, self.POWER_ITERATIONS)
        if is_transformed():
            return top_singular_pair(dictionary)
        if is_traced(dictionary):
            return top_singular_pair(dictionary, 10 * self.POWER_ITERATIONS)
        return self._pair.of(self.dictionary, top_singular_pair)


class FoldedISTA(nn.Module):
    """Several steps of a `BoundedISTA` for inference."""

    operator: Tensor  # eta D'
    gram: Tensor | None  # eta D'^T D'

    def __init__(self, ista: BoundedISTA) -> None:
        super().__init__()
        operator, gram = ista.matrices()
        self.register_buffer("operator", operator)
        self.register_buffer("gram", gram)
        self.shift, self.steps = ista.step_size * ista.threshold, ista.steps

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The code."""
        return ista_from_zero(x, self.operator, self.gram, self.shift, self.steps)


class CompressingEncoderLayer(EncoderLayer):
    """Compress, with a guarantee: X = LN(Z); Z_half = X + Compression(X); Z_next = ISTA(LN(Z_half)).

    With stochastic depth a layer's step is left out of some images and is not enlarged in the others, since kappa must
    stay below 1.
    """

    attention: ClassVar[Any] = Compression
    scale_drop_path: ClassVar[bool] = False
    starts_from_norm: ClassVar[bool] = True  # X = LN(Z) is what the step lowers R^c of
    theorems: ClassVar[frozenset[str]] = frozenset({"compress"})


class MonotoneEncoderLayer(CompressingEncoderLayer):
    """Compress, then sparsify, both with a guarantee: Z_half as `CompressingEncoderLayer`; BoundedISTA(LN(Z_half))."""

    sparse_coding: ClassVar[Any] = BoundedISTA
    theorems: ClassVar[frozenset[str]] = CompressingEncoderLayer.theorems | {"lasso_zero"}

    def __init__(self, embed_dim: int, num_heads: int, *, ista_steps: int = MONOTONE_STEPS, **options: Any) -> None:
        """Build a layer; `options` are those of `EncoderLayer`."""
        super().__init__(embed_dim, num_heads, **options)
        assert isinstance(self.ista, BoundedISTA)
        self.ista.steps = ista_steps


class MonotoneDecoderLayer(DecoderLayer):
    """The way back: X = LN(LN(Y) E^T); Y_next = X - Decompression(X), which lowers no rate."""

    attention: ClassVar[Any] = Decompression
    starts_from_norm: ClassVar[bool] = True
    theorems: ClassVar[frozenset[str]] = frozenset({"decompress"})


def _re_orthogonalised(weight: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The weight after a function of it, in its own precision also under autocast, without any derivative.

    By default its `retraction`; where numbers are not available, one Newton-Schulz step.
    """
    if function is None:
        function = newton_schulz if is_traced(weight) else retraction
    with torch.no_grad(), without_autocast(weight.device):
        return function(weight.detach())


@torch.no_grad()
def _init_orthogonal(parameter: Tensor, gain: float = 1.0) -> None:
    """Draw a uniformly distributed orthogonal matrix; in float32, since half precisions have no QR decomposition."""
    if not parameter.is_meta:
        matrix = torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        parameter.copy_(nn.init.orthogonal_(matrix, gain=gain))


def _straight_through(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`; its gradient passes straight through to `parameter`."""
    return value + (parameter - parameter.detach()) if torch.is_grad_enabled() else value


def retract_(model: nn.Module) -> None:
    """Re-orthogonalise all subspaces, from now on instead of their own forward passes.

    For training loops, after every step of the optimizer.
    """
    for module in model.modules():
        if isinstance(module, OrthogonalSubspaces):
            module.retracts_itself = False
            module.retract_()


def orthogonal_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are kept orthogonal: weight decay would only shorten them."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, OrthogonalSubspaces)}


def check_monotone(model: nn.Module) -> None:
    """Raise a `UserError`, which names the layer, for weights that are not finite, far from orthogonal or too large."""
    for name, module in model.named_modules():
        if not isinstance(module, Compression):
            continue
        if not bool(module.get_parameter(module.RATE).isfinite().all()):
            raise UserError(
                f"{name}.{module.RATE} has values that are not finite: take an earlier checkpoint of the run."
            )
        for what, key in (("an inverse temperature", "log_scale"), ("a step size", "log_rate")):
            value = getattr(module, key, None)
            if value is not None and not bool((value.detach().float() <= module.MOST_LOG_SCALE).all()):
                raise UserError(
                    f"{name}.{key} is {float(value.detach().max()):.3g} at most, {what} beyond {MOST_SCALE:g}: "
                    "attention cannot be computed with it.\n"
                    "Training has diverged: take an earlier checkpoint of the run."
                )
        try:
            nearest_orthogonal(module.subspaces.weight.detach())
        except UserError as error:
            raise UserError(f"{name}.subspaces: {error}") from error


def refuse_earlier_layers(names: Iterable[str], where: str) -> None:
    """Raise a `UserError` for tensors of the monotone layers of an earlier version."""
    if any(name.endswith("attn.rate_logit") for name in names):
        raise UserError(
            f"{where} holds monotone layers of an earlier version, which allowed kappa below 1/2.\n"
            "Train the model again, or use the version of crate-mae that made it."
        )
