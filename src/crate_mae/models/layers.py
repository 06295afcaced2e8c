"""The layers of CRATE-MAE: parameters around the functions of `theory`.

    encoder layer      Z_half = Z + MSSA(LN(Z))          Z_next = ISTA(LN(Z_half))
    decoder layer      Y_half = LN(Y) E^T                Y_next = Y_half - MSSA(LN(Y_half))

The encoder compresses, then sparsifies; the decoder leaves the sparse code, then runs the compression backward.
Both use the same `MSSA`: only the sign of the step differs.

The same classes serve training, TorchScript (comments `# type:` are for it), `torch.fx`, `torch.func`, timm's
`AttentionExtract` and export. `folded()` of a module is its form for inference, in which all that depends on weights
alone is computed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Final, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, use_fused_attn
from torch import Tensor, fx, nn

from crate_mae.errors import UserError
from crate_mae.private_torch import FakeTensor, is_transformed
from crate_mae.theory.attention import attention_membership, ssa
from crate_mae.theory.sparse_coding import apply_ista_operator, ista_operator, ista_preactivation, sparse_codes

T = TypeVar("T")
OutputProjection = Literal["free", "tied"]


class SubspaceAttention(nn.Module):
    """Tokens are projected onto subspaces, attend in each, and go back: what MSSA and monotone layers have in common.

    Attributes:
        num_heads: number of subspaces h; the subspace dimension is p = d / h.
        per_head: the identity, which every head's step in the coordinates of its subspace passes: P_k W_k, or
            kappa_k (B_k W_k - W_k). A place for hooks.
        fused_attn: whether attention weights stay inside one function. After `timm.layers.set_fused_attn(False)` a new
            layer computes them by `membership` and passes them through `attn_drop`, for hooks; it drops none.
    """

    num_heads: int
    fused_attn: Final[bool]

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"The width {embed_dim} cannot be split into {num_heads} heads of equal dimension.")
        self.num_heads = num_heads
        self.per_head = nn.Identity()
        self.fused_attn = use_fused_attn()
        if not self.fused_attn:
            self.attn_drop = nn.Dropout(0.0)

    def split(self, w: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n p"]:
        # type: (Tensor) -> Tensor
        """[W_1 .. W_h], side by side, as h matrices."""
        return w.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MSSA(SubspaceAttention):
    """Multi-head subspace self-attention: MSSA(Z | U) = sum_k SSA(Z | U_k) W_k^T (+ bias).

    SSA(Z | U_k) = softmax(s (Z U_k)(Z U_k)^T) Z U_k with s = p^-1/2: query, key and value are the one projection of
    the tokens onto subspace k. "Masked Completion via Structured Diffusion", section 2.2; `crate_encoder.py`,
    `Attention`, of the official code.

    Attributes:
        subspaces: the linear map whose weight is [U_1 .. U_h]^T, (h p) x d, and whose output is [Z U_1 .. Z U_h].
        proj: the free output projection with bias, [W_1 .. W_h]; None when tied, where W_k = U_k as in the theory.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        output_projection: OutputProjection = "free",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.subspaces = nn.Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype) if output_projection == "free" else None

    def bases(self) -> Float[Tensor, "h d p"]:
        """The subspace bases U_k, as a view of the parameters."""
        return self.subspaces.weight.unflatten(0, (self.num_heads, -1)).mT

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor) -> Tensor
        """The step that the layer adds: attend within each subspace and go back to the space of the tokens."""
        w = self.project(x)
        return self.step(w, ssa(w) if self.fused_attn else self.attn_drop(self.membership(w)) @ w)

    def project(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n p"]:
        # type: (Tensor) -> Tensor
        """W_k = X U_k for all subspaces."""
        return self.split(self.subspaces(x))

    def membership(self, w: Float[Tensor, "b h n p"]) -> Float[Tensor, "b h n n"]:
        # type: (Tensor) -> Tensor
        """P_k = softmax(s W_k W_k^T): which tokens each token reads."""
        return attention_membership(w)

    def step(self, w: Float[Tensor, "b h n p"], mixed: Float[Tensor, "b h n p"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor, Tensor) -> Tensor
        """sum_k (P_k W_k) W_k^T from the mixed tokens P_k W_k; the published step has no use for W_k unmixed."""
        del w
        heads = self.per_head(mixed).transpose(1, 2).flatten(2)
        return F.linear(heads, self.subspaces.weight.t()) if self.proj is None else self.proj(heads)


class KeepsValues(nn.Module):
    """A module with `KeptValue`s, which are for `eval()`: in training weights change with every step."""

    def train(self, mode: bool = True) -> Self:
        """As PyTorch does; what was kept is dropped."""
        for value in vars(self).values():
            if isinstance(value, KeptValue):
                value.clear()
        return super().train(mode)


class ISTA(KeepsValues):
    """One proximal-gradient step towards the sparse code of the tokens in a learned dictionary.

    ISTA(X | D) = relu(X + eta (X D - X D^T D) - eta lambda), computed as `theory.sparse_coding.ista_step` does, by one
    matrix product, X W. In `eval()`, without gradients, on a CPU, W is formed once and kept: that costs d^3, which for
    a single image is half the layer. `crate_encoder.py`, `FeedForward`, of the official code.

    Attributes:
        dictionary: D, d x d; a code A reconstructs X as A D^T.
        step_size: eta.
        threshold: lambda, the weight of the l1 norm.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        step_size: float = 0.1,
        threshold: float = 0.5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.step_size = step_size
        self.threshold = threshold
        self.dictionary = nn.Parameter(torch.empty(embed_dim, embed_dim, device=device, dtype=dtype))
        self._kept = KeptValue()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries uniform in +-sqrt(6/d), the official initialisation."""
        _init_dictionary(self.dictionary)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor) -> Tensor
        """The non-negative sparse code after one step from the tokens themselves."""
        if torch.jit.is_scripting():
            return apply_ista_operator(x, self.operator(), self.step_size * self.threshold)
        else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
            if isinstance(x, fx.Proxy):
                return as_one_step(self, x)
            return apply_ista_operator(x, self._formed(self.operator, x), self.step_size * self.threshold)

    def operator(self) -> Float[Tensor, "d d"]:
        # type: () -> Tensor
        """W = I + eta (D - D^T D); the code is relu(X W - eta lambda)."""
        return ista_operator(self.dictionary, self.step_size)

    def preactivation(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the code is the positive part of."""
        return ista_preactivation(x, self.operator(), self.step_size * self.threshold)

    def lasso_dictionary(self) -> Float[Tensor, "d d"]:
        """The dictionary of the lasso that the step is about: D."""
        return self.dictionary

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The same function for inference, a linear map and a ReLU: relu(X W - eta lambda) with W as a weight."""
        operator = self.operator()
        width = len(operator)
        step = nn.Linear(width, width, device=operator.device, dtype=operator.dtype)
        step.weight.copy_(operator.mT)
        step.bias.fill_(-self.step_size * self.threshold)
        return nn.Sequential(step, nn.ReLU())

    def _formed(self, form: Callable[[], T], x: Tensor, *numbers: float) -> T:
        """`form()`; in `eval()` what is kept of it, unless the dictionary, step size, precision or numbers changed."""
        must_form = self.training or torch.is_grad_enabled() or x.device.type != "cpu"
        if must_form or is_traced(self.dictionary):
            return form()
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.dictionary.dtype
        return self._kept.of(self.dictionary, lambda _dictionary: form(), (self.step_size, precision, *numbers))

    def extra_repr(self) -> str:
        """Width, step size and threshold, for `print(model)`."""
        return f"{self.dictionary.shape[0]}, step_size={self.step_size}, threshold={self.threshold}"


class OvercompleteISTA(nn.Module):
    """CRATE-alpha's sparse coding: two ISTA steps in an overcomplete dictionary, read out by a dictionary of its own.

    A <- two iterations of `theory.sparse_coding.sparse_codes` from A = 0; the output is A G^T. D has m = `overcomplete`
    d atoms, and G ("decoupled") is another d x m matrix, where the derivation has D itself. Yang et al., "Scaling
    White-Box Transformers for Vision", arXiv 2405.20299; they add the output to the layer's input (`ista_skip`).

    Attributes:
        dictionary: D, d x m.
        readout: G, d x m, the weight of a linear map without bias.
    """

    STEPS = 2

    def __init__(
        self,
        embed_dim: int,
        *,
        overcomplete: int,
        step_size: float = 0.1,
        threshold: float = 0.5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.step_size = step_size
        self.threshold = threshold
        atoms = overcomplete * embed_dim
        self.dictionary = nn.Parameter(torch.empty(embed_dim, atoms, device=device, dtype=dtype))
        self.readout = nn.Linear(atoms, embed_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of D uniform in +-sqrt(6/m); G is a linear map and initialised as one."""
        _init_dictionary(self.dictionary)

    def lasso_dictionary(self) -> Float[Tensor, "d m"]:
        """The dictionary of the lasso that the steps are about: D."""
        return self.dictionary

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # type: (Tensor) -> Tensor
        """Tokens rebuilt from their non-negative sparse codes."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript reads all of a condition
            if isinstance(x, fx.Proxy):
                return as_one_step(self, x)
        return self.readout(sparse_codes(x, self.dictionary, self.step_size, self.threshold, self.STEPS))


class Dictionary(nn.Module):
    """The decoder's dictionary E: from codes to tokens, Y E^T. `crate_decoder.py`, `FeedForward`, officially."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries uniform in +-sqrt(6/d), the official initialisation."""
        _init_dictionary(self.weight)

    def forward(self, y: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Y E^T."""
        return F.linear(y, self.weight)


class EncoderLayer(nn.Module):
    """Compress, then sparsify: Z_half = Z + MSSA(LN(Z)); Z_next = ISTA(LN(Z_half)).

    ISTA replaces its normalised input, as in the official code. With `ista_skip` it is added instead,
    Z_next = Z_half + ISTA(LN(Z_half)), which departs from the derivation. With `overcomplete` > 1, `OvercompleteISTA`
    takes its place, which TorchScript cannot read.
    """

    attention: ClassVar[Any] = MSSA
    sparse_coding: ClassVar[Any] = ISTA
    scale_drop_path: ClassVar[bool] = True
    starts_from_norm: ClassVar[bool] = False  # whether the attention's step is added to LN(Z), not to Z
    __constants__ = ("starts_from_norm",)  # for TorchScript

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        step_size: float = 0.1,
        threshold: float = 0.5,
        ista_skip: bool = False,
        overcomplete: int = 1,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        """Build a layer; `attention` are more options of its attention, such as MSSA's `output_projection`."""
        super().__init__()
        self.ista_skip = ista_skip
        self.norm1 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.attn = self.attention(embed_dim, num_heads, **attention, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path, scale_by_keep=self.scale_drop_path)
        self.norm2 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        build = self.sparse_coding if overcomplete == 1 else partial(OvercompleteISTA, overcomplete=overcomplete)
        self.ista = build(embed_dim, step_size=step_size, threshold=threshold, device=device, dtype=dtype)

    def forward(
        self,
        z: Float[Tensor, "b n d"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b n d"]:
        # type: (Tensor, Tensor | None, bool) -> Tensor
        """One layer. The last two arguments belong to timm's block contract and must keep their defaults.

        Raises:
            ValueError: for an attention mask or causal attention, which subspace attention does not define.
        """
        refuse_mask(attn_mask, is_causal)
        x = self.norm1(z)
        start = x if self.starts_from_norm else z
        z_half = start + self.drop_path(self.attn(x))
        code = self.ista(self.norm2(z_half))
        return z_half + self.drop_path(code) if self.ista_skip else code


@fx.wrap
def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a `ValueError` for what timm's blocks take and subspace attention does not define."""
    if attn_mask is not None or is_causal:
        raise ValueError("Subspace self-attention is defined over all tokens: it takes no mask and is not causal.")


class DecoderLayer(nn.Module):
    """The encoder layer's way back: Y_half = LN(Y) E^T; Y_next = Y_half - MSSA(LN(Y_half)).

    Decoder layer l is meant to undo encoder layer L - 1 - l: a code becomes tokens, and the compressing step is taken
    with the opposite sign.
    """

    attention: ClassVar[Any] = MSSA
    starts_from_norm: ClassVar[bool] = False  # whether the attention's step is taken from LN(Y_half), not from Y_half

    def __init__(self, embed_dim: int, num_heads: int, **attention: Any) -> None:
        """Build a layer; `attention` are more options of its attention, such as MSSA's `output_projection`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.dictionary = Dictionary(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.attn = self.attention(embed_dim, num_heads, **attention)

    def forward(self, y: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """One layer."""
        y_half = self.dictionary(self.norm1(y))
        x = self.norm2(y_half)
        return (x if self.starts_from_norm else y_half) - self.attn(x)


class KeptValue:
    """The value of a function of a tensor, computed again when the tensor has changed.

    Numbers are compared, since fused optimizers and writes to `.data` do not raise a tensor's version.
    """

    def __init__(self) -> None:
        self._entry: tuple[object, Tensor, Any] | None = None  # settings, a copy of the tensor, the value

    def of(self, tensor: Tensor, function: Callable[[Tensor], Any], settings: object = None) -> Any:
        """`function(tensor)`; computed again if its numbers, precision or device, or `settings`, have changed."""
        entry = self._entry  # of this call, whatever other threads do
        if entry is None or entry[0] != settings or not is_same(entry[1], tensor):
            with torch.inference_mode(False), torch.no_grad():  # what is kept will be used outside that mode, too
                copy = tensor.detach().clone()
                entry = self._entry = settings, copy, function(copy)
        return entry[2]

    def clear(self) -> None:
        """Free the memory of the value."""
        self._entry = None


def is_same(kept: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor still has the numbers, precision and device that it had."""
    if kept is None or (kept.dtype, kept.device) != (tensor.dtype, tensor.device):
        return False
    return torch.equal(kept, tensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether values are not available, or not to be kept: under a compiler, a transform, or with shapes alone."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return True
    return torch.jit.is_tracing() or is_transformed()


def as_one_step(module: nn.Module, x: Any) -> Any:
    """For `torch.fx`, whose tracers cannot follow what depends on values: a graph's one step that calls the module."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def _init_dictionary(dictionary: Tensor) -> None:
    bound = math.sqrt(6.0 / dictionary.shape[1])
    nn.init.uniform_(dictionary, -bound, bound)


fx.wrap("ssa")
