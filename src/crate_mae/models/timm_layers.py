"""CRATE's encoder layer for programs that read programs: TorchScript, `torch.fx` and timm's `AttentionExtract`.

The parameters, their names and the function are those of `models.layers`. Different is how it is written: TorchScript
knows no annotated shapes and no autograd functions, `torch.fx` no branches on values, and `AttentionExtract` looks for
a softmax and a module called `attn_drop`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, use_fused_attn
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from crate_mae.models.config import Layer
from crate_mae.models.layers import ISTA, MSSA, EncoderLayer, OutputProjection, OvercompleteISTA
from crate_mae.models.masking import patchify, unpatchify
from crate_mae.models.monotone import BoundedISTA, Compression, MonotoneEncoderLayer, OrthogonalSubspaces
from crate_mae.theory.attention import ssa
from crate_mae.theory.compression import balanced_ssa
from crate_mae.theory.sparse_coding import ista_step


@register_notrace_function
def attend(w: Tensor) -> Tensor:
    """`theory.attention.ssa`; in TorchScript, and where there are shapes alone, by PyTorch's own kernel."""
    if w.is_meta or torch.jit.is_scripting():
        return F.scaled_dot_product_attention(w, w, w)
    else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
        return ssa(w)


@register_notrace_function
def sparsify(x: Tensor, dictionary: Tensor, step_size: float, threshold: float) -> Tensor:
    """`theory.sparse_coding.ista_step`; in TorchScript, and where there are shapes alone, its formula."""
    if x.is_meta or torch.jit.is_scripting():
        update = x @ dictionary - x @ dictionary.t() @ dictionary
        return F.relu(x + step_size * update - step_size * threshold)
    else:  # noqa: RET505
        return ista_step(x, dictionary, step_size, threshold)


@register_notrace_function
def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a `ValueError` for what timm's blocks take and subspace attention does not define."""
    if attn_mask is not None or is_causal:
        raise ValueError("Subspace self-attention is defined over all tokens: it takes no mask and is not causal.")


class TimmMSSA(MSSA):
    """`MSSA` as timm writes attention: fused, or, after `timm.layers.set_fused_attn(False)`, with a visible softmax.

    Attributes:
        fused_attn: whether the attention weights stay inside one function.
        attn_drop: what the visible weights pass through, for hooks; it drops none.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        output_projection: OutputProjection = "free",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, output_projection=output_projection, device=device, dtype=dtype)
        self.fused_attn = use_fused_attn()
        self.scale = (embed_dim // num_heads) ** -0.5
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """See `MSSA`; b n d to b n d."""
        w = self.subspaces(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.fused_attn:
            heads = attend(w)
        else:
            membership = (self.scale * w) @ w.transpose(-2, -1)
            membership = self.attn_drop(membership.softmax(dim=-1))
            heads = membership @ w
        heads = heads.transpose(1, 2).flatten(2)
        if self.proj is None:
            return F.linear(heads, self.subspaces.weight.t())
        return self.proj(heads)


class TimmISTA(ISTA):
    """`ISTA`, written so that it can be read."""

    def forward(self, x: Tensor) -> Tensor:
        """See `ISTA`; b n d to b n d."""
        return sparsify(x, self.dictionary, self.step_size, self.threshold)


class TimmEncoderLayer(EncoderLayer):
    """`EncoderLayer`, written so that it can be read. With `overcomplete` > 1 TorchScript still cannot."""

    attention = TimmMSSA
    sparse_coding = TimmISTA

    def forward(self, z: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See `EncoderLayer`; b n d to b n d."""
        refuse_mask(attn_mask, is_causal)
        z_half = z + self.drop_path(self.attn(self.norm1(z)))
        code = self.ista(self.norm2(z_half))
        return z_half + self.drop_path(code) if self.ista_skip else code


def settled(weight: Tensor) -> Tensor:
    """`theory.subspaces.nearest_orthogonal` for TorchScript, of any weight that training leaves."""
    u = weight
    for _ in range(20):
        u = 1.5 * u - 0.5 * (u @ (u.t() @ u))
    return u


class TimmSubspaces(OrthogonalSubspaces):
    """`OrthogonalSubspaces`, written so that TorchScript can read it."""

    def forward(self, x: Tensor) -> Tensor:
        """See `OrthogonalSubspaces`; b n d to b n d."""
        if torch.jit.is_scripting():
            return F.linear(x, settled(self.weight))
        else:  # noqa: RET505  # TorchScript compiles what is not in a branch that it can rule out
            return F.linear(x, self.matrix())


class TimmCompression(Compression):
    """`Compression`, written so that TorchScript can read it; for `torch.fx` it is one piece.

    After `timm.layers.set_fused_attn(False)` the balanced memberships pass through `attn_drop`, for hooks.
    """

    orthogonal = TimmSubspaces
    fused_attn: Final[bool]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, device=device, dtype=dtype)
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """See `Compression`; b n d to b n d."""
        if torch.jit.is_scripting():
            u = settled(self.subspaces.weight)
            w = F.linear(x, u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            root = torch.exp(self.log_scale / 2)[:, None, None]
            membership = torch.softmax((root * w) @ (root * w).transpose(-2, -1), dim=-1)
            mixed = membership @ (w * membership.sum(dim=-2).unsqueeze(-1).clamp(min=1e-24).rsqrt())
            change = torch.sigmoid(self.rate_logit)[:, None, None] * (mixed - w)
            return F.linear(change.transpose(1, 2).flatten(2), u.t())
        else:  # noqa: RET505
            w = self.project(x)
            fused = self.fused_attn and not x.is_meta  # shapes alone have no autocast
            return self.step(
                w, balanced_ssa(w, self.scale()) if fused else self.attn_drop(self.membership(w)).to(w.dtype) @ w
            )


class TimmBoundedISTA(BoundedISTA):
    """`BoundedISTA`, written so that TorchScript can read it; for `torch.fx` it is one piece."""

    def forward(self, x: Tensor) -> Tensor:
        """See `BoundedISTA`; b n d to b n d."""
        if torch.jit.is_scripting():
            norm = torch.linalg.matrix_norm(self.dictionary, ord=2)
            dictionary = self.dictionary / (self.step_size**0.5 * norm).clamp(min=1)
            return F.relu(self.step_size * (x @ dictionary) - self.step_size * self.threshold)
        else:  # noqa: RET505
            return super().forward(x)


class TimmMonotoneEncoderLayer(MonotoneEncoderLayer):
    """`MonotoneEncoderLayer`, written so that it can be read."""

    attention = TimmCompression
    sparse_coding = TimmBoundedISTA

    def forward(self, z: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See `MonotoneEncoderLayer`; b n d to b n d."""
        refuse_mask(attn_mask, is_causal)
        x = self.norm1(z)
        return self.ista(self.norm2(x + self.drop_path(self.attn(x))))


TIMM_LAYERS: Mapping[Layer, type[EncoderLayer]] = {
    "published": TimmEncoderLayer,
    "monotone": TimmMonotoneEncoderLayer,
}


class NormedPatchEmbed(PatchEmbed):
    """Patches to tokens as in the official CRATE classifiers: a patch's pixels are normalised, and so is its token.

    Attributes:
        pixel_norm: over the numbers of a patch, in the order of `masking.patchify`.
    """

    EPS: ClassVar[float] = 1e-5

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=self.EPS)
        super().__init__(*arguments, **options)
        self.side = int(self.patch_size[0])
        self.pixel_norm = nn.LayerNorm(self.side**2 * self.proj.in_channels, eps=self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Images b c hh ww to tokens b n d, or b gh gw d where any size is taken."""
        grid = (x.shape[2] // self.side, x.shape[3] // self.side)
        return super().forward(unpatchify(self.pixel_norm(patchify(x, self.side)), self.side, grid))


for _module in (OvercompleteISTA, TimmCompression, TimmBoundedISTA):
    register_notrace_module(_module)
