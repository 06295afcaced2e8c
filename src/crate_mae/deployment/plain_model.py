"""An encoder of CRATE-MAE, or a classifier with one, in plain PyTorch: this file needs torch and safetensors alone.

    from model import load

    model = load()          # reads config.json and model.safetensors beside this file
    tokens = model(images)  # of a classifier: logits

Images are b x c x hh x ww, normalised as README.md says; tokens are b x (1 + n) x d, the class token first. For
inference: what training keeps apart is multiplied out in the file. A layer maps tokens Z to

    X = LN(Z),   W_k = X U_k
    Z_half = Z + sum_k P_k W_k V_k^T + bias,                  P_k = softmax(s_k W_k W_k^T)        published layers
    Z_half = X + sum_k kappa_k (B_k W_k - W_k) U_k^T,         B_k = P_k diag(P_k^T 1)^-1/2        the other layers
    Y = LN(Z_half),   C = Y D - shift,   A = relu(C),         then A <- relu(C + A - A N) where it has N
    Z_next = A, or A G^T where it has G, or Z_half added to either in models with a skip

"Masked Completion via Structured Diffusion with White-Box Transformers" (ICLR 2024, arXiv 2404.02446).
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Layer(nn.Module):
    """One layer, from its tensors: those that it does not have are None."""

    norm1_weight: Tensor  # d
    norm1_bias: Tensor  # d
    subspaces: Tensor  # [U_1 .. U_h], d x d
    scale: Tensor  # s, h
    rate: Tensor | None  # kappa, h
    proj_weight: Tensor  # [V_1 .. V_h]^T, d x d
    proj_bias: Tensor  # d
    norm2_weight: Tensor  # d
    norm2_bias: Tensor  # d
    operator: Tensor  # D, d x m
    shift: Tensor  # a number
    gram: Tensor  # N, m x m
    readout: Tensor | None  # G^T, m x d

    def __init__(self, tensors: dict[str, Tensor], *, eps: float, ista_steps: int, skip: bool) -> None:
        super().__init__()
        self.eps, self.ista_steps, self.skip = eps, ista_steps, skip
        for name in Layer.__annotations__:
            self.register_buffer(name, tensors.get(name))

    def forward(self, z: Tensor) -> Tensor:
        """Tokens b m d to tokens b m d."""
        x = F.layer_norm(z, z.shape[-1:], self.norm1_weight, self.norm1_bias, self.eps)
        w = (x @ self.subspaces).unflatten(-1, (len(self.scale), -1)).transpose(1, 2)  # b h m p
        p = torch.softmax(self.scale[:, None, None] * w @ w.mT, dim=-1)
        if self.rate is None:
            step = (p @ w).transpose(1, 2).flatten(2) @ self.proj_weight + self.proj_bias
            z_half = z + step
        else:
            b = p * p.sum(-2, keepdim=True).clamp(min=1e-24).rsqrt()
            step = self.rate[:, None, None] * (b @ w - w)
            z_half = x + step.transpose(1, 2).flatten(2) @ self.subspaces.mT
        y = F.layer_norm(z_half, z.shape[-1:], self.norm2_weight, self.norm2_bias, self.eps)
        c = y @ self.operator - self.shift
        a = torch.relu(c)
        for _ in range(self.ista_steps - 1):
            a = torch.relu(c + a - a @ self.gram)
        code = a if self.readout is None else a @ self.readout
        return z_half + code if self.skip else code


class Model(nn.Module):
    """Images to tokens, or to the logits of a classifier.

    Attributes:
        classes: names of the classes, in the order of the logits; empty for an encoder.
    """

    patch_weight: Tensor  # d x c x patch x patch
    patch_bias: Tensor  # d
    class_token: Tensor  # 1 x 1 x d
    positions: Tensor  # 1 x (1 + n) x d
    norm_weight: Tensor  # d
    norm_bias: Tensor  # d
    head_norm_weight: Tensor  # f
    head_norm_bias: Tensor  # f
    head_weight: Tensor | None  # k x f
    head_bias: Tensor  # k

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        self.image_size, self.patch_size = tuple(config["image_size"]), config["patch_size"]
        self.eps, self.head_eps = config["eps"], config["head_eps"]
        self.pooling, self.classes = config["pooling"], tuple(config["classes"])
        for name in Model.__annotations__:
            self.register_buffer(name, tensors.get(name))
        how: dict[str, Any] = {
            "eps": config["layer_eps"],
            "ista_steps": config["ista_steps"],
            "skip": config["ista_skip"],
        }
        self.blocks = nn.Sequential(*(Layer(_below(tensors, f"blocks.{i}."), **how) for i in range(config["depth"])))

    def forward(self, images: Tensor) -> Tensor:
        """Tokens b 1+n d, or logits b k."""
        tokens = self.tokens(images)
        if self.head_weight is None:
            return tokens
        pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
        x = torch.cat([pooled[name] for name in self.pooling.split("+")], dim=1)
        x = F.layer_norm(x, x.shape[-1:], self.head_norm_weight, self.head_norm_bias, self.head_eps)
        return x @ self.head_weight.mT + self.head_bias

    def tokens(self, images: Tensor) -> Tensor:
        """The normalised tokens of the last layer, b 1+n d."""
        wanted = (self.patch_weight.shape[1], *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"Images are {tuple(images.shape)}, but this model takes b x c x hh x ww of {wanted}.")
        patches = F.conv2d(images, self.patch_weight, self.patch_bias, stride=self.patch_size).flatten(2).mT
        z = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        z = self.blocks(z)
        return F.layer_norm(z, z.shape[-1:], self.norm_weight, self.norm_bias, self.eps)


def load(folder: str | Path = Path(__file__).parent) -> Model:
    """The model in a folder, ready for inference."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return Model(load_file(Path(folder) / "model.safetensors"), config).eval()


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
