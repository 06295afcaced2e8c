"""Models at rest: everything that is the same at every call is computed once.

A model in training forms the ISTA operator W = I + eta (D - D^T D) anew at each step, since D moves. A deployed one has
it as the weight of a linear map, with -eta lambda as its bias: relu(X W - eta lambda) is then one product. Attention is
written as PyTorch's own, which exporters know, and a tied output projection as the linear map that it is. Of monotone
layers the orthogonal matrix itself is written down, and the bounded dictionary.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.models.layers import ISTA, MSSA
from crate_mae.models.monotone import Compression
from crate_mae.theory.compression import LEAST_COLUMN_SUM


class FoldedISTA(nn.Module):
    """relu(X W - eta lambda) with the operator W already formed."""

    @torch.no_grad()
    def __init__(self, ista: ISTA) -> None:
        super().__init__()
        width = len(ista.dictionary)
        self.step = nn.Linear(width, width, device=ista.dictionary.device, dtype=ista.dictionary.dtype)
        self.step.weight.copy_(ista.operator().mT)
        self.step.bias.fill_(-ista.step_size * ista.threshold)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The non-negative sparse code after one step."""
        return F.relu(self.step(x))


class FoldedMSSA(nn.Module):
    """MSSA by PyTorch's attention, with the output projection, tied or not, as a linear map."""

    @torch.no_grad()
    def __init__(self, mssa: MSSA) -> None:
        super().__init__()
        self.num_heads = mssa.num_heads
        self.subspaces = mssa.subspaces
        if mssa.proj is not None:
            self.proj = mssa.proj
        else:
            weight = mssa.subspaces.weight
            self.proj = nn.Linear(*weight.shape, bias=False, device=weight.device, dtype=weight.dtype)
            self.proj.weight.copy_(weight.mT)

    def forward(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attend within each subspace and bring the results back to the ambient space."""
        w = self.subspaces(z).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(w, w, w).transpose(1, 2).flatten(2))


class FoldedCompression(nn.Module):
    """The compressing step as three linear maps and PyTorch's softmax: U at rest, kappa_k inside the way back."""

    @torch.no_grad()
    def __init__(self, compression: Compression) -> None:
        super().__init__()
        self.num_heads = compression.num_heads
        u = compression.subspaces.matrix()
        self.subspaces, self.back = (nn.Linear(*u.shape, bias=False, device=u.device, dtype=u.dtype) for _ in range(2))
        self.subspaces.weight.copy_(u)
        rates = compression.rate().reshape(-1).to(u.dtype).repeat_interleave(len(u) // self.num_heads)
        self.back.weight.copy_(u.mT * rates)
        self.register_buffer("root", compression.scale().sqrt().to(u.dtype))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The step from the tokens X."""
        w = self.subspaces(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        t = self.root * w
        membership = torch.softmax(t @ t.mT, dim=-1)
        mixed = membership @ (w * membership.sum(-2).unsqueeze(-1).clamp_min(LEAST_COLUMN_SUM).rsqrt())
        return self.back((mixed - w).transpose(1, 2).flatten(2))


def folded(model: nn.Module) -> Any:
    """A copy of a model for inference, in `eval()`, that computes the same; its parameters have other names.

    Layers of timm, and CRATE-alpha's sparse coding, in which nothing is the same at every call, stay as they are.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replacements: dict[type, type] = {ISTA: FoldedISTA, MSSA: FoldedMSSA, Compression: FoldedCompression}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            for kind, fold in replacements.items():
                if isinstance(child, kind):
                    setattr(parent, name, fold(child))
    return model.requires_grad_(False)
