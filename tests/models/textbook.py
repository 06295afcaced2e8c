"""CRATE-MAE as the paper writes it, on an official state dict: the oracle that the project's fast forms are held to.

Every step is spelled out: three products for ISTA, explicit attention, one loop over layers. Written from the paper's
equations and checked, as our own model is, against stored outputs of the official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def mssa(z: Tensor, state: dict[str, Tensor], name: str, heads: int) -> tuple[Tensor, Tensor]:
    """Output, and the attention weights of each head."""
    u = state[f"{name}.qkv.weight"].T
    p = u.shape[1] // heads
    out, maps = [], []
    for k in range(heads):
        w = z @ u[:, k * p : (k + 1) * p]
        attention = torch.softmax(w @ w.mT / p**0.5, dim=-1)
        maps.append(attention)
        out.append(attention @ w)
    projected = torch.cat(out, dim=-1) @ state[f"{name}.to_out.0.weight"].T + state[f"{name}.to_out.0.bias"]
    return projected, torch.stack(maps, dim=1)


def ista(x: Tensor, dictionary: Tensor, step_size: float, threshold: float) -> Tensor:
    return torch.relu(x + step_size * (x @ dictionary - x @ dictionary.T @ dictionary) - step_size * threshold)


def forward(
    state: dict[str, Tensor],
    images: Tensor,
    mask: Tensor,
    heads: int,
    step_size: float = 0.1,
    threshold: float = 0.5,
) -> dict[str, Tensor]:
    """Prediction, latent, losses, every layer's output and the encoder's attention maps."""
    weight = state["patch_embed.proj.weight"]
    patch = weight.shape[-1]
    results: dict[str, Tensor] = {}
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # b c gh gw p p
    embedded = torch.einsum("bcyxij,dcij->byxd", cut, weight).flatten(1, 2) + state["patch_embed.proj.bias"]
    hidden = mask[..., None]
    z = torch.where(hidden, state["mask_token"], embedded)
    z = torch.cat([state["cls_token"].expand(len(z), -1, -1), z], dim=1) + state["decoder_pos_embed"]
    for i in range(count(state, "blocks")):
        name = f"blocks.{i}.layers.0"
        step, maps = mssa(layer_norm(z, state, f"{name}.0.norm", 1e-5), state, f"{name}.0.fn", heads)
        half = layer_norm(z + step, state, f"{name}.1.norm", 1e-5)
        z = ista(half, state[f"{name}.1.fn.weight"], step_size, threshold)
        results[f"enc.{i}"], results[f"attn.{i}"] = z, maps
    results["latent"] = y = layer_norm(z, state, "norm", 1e-6)
    for i in range(count(state, "decoder_blocks")):
        name = f"decoder_blocks.{i}.layers.0"
        half = layer_norm(y, state, f"{name}.0.norm", 1e-5) @ state[f"{name}.0.fn.weight"].T
        step, _ = mssa(layer_norm(half, state, f"{name}.1.norm", 1e-5), state, f"{name}.1.fn", heads)
        y = half - step
        results[f"dec.{i}"] = y
    y = layer_norm(y, state, "decoder_norm", 1e-6)[:, 1:]
    results["pred"] = y @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
    target = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    normal = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    for key, goal in (("loss", target), ("loss_norm_pix", normal)):
        results[key] = (((results["pred"] - goal) ** 2).mean(-1) * mask).sum() / mask.sum()
    return results


def count(state: dict[str, Tensor], stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
