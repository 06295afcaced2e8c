"""CRATE-MAE as the papers write it, on an official state dict: three products for ISTA, explicit attention, a loop.

It is what our fast forms are held to: the tests ask for its numbers and gradients, the benchmark for less than its time
and memory. Written from the equations and checked, as our own model is, against stored outputs of the official code.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Mapping[str, Tensor]
STEP_SIZE = 0.1
THRESHOLD = 0.5
_UNUSED = ("pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias")  # fixed, or never read


def layer_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    """LN(X) with the scale and shift of a name."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def mssa(z: Tensor, state: State, name: str, heads: int) -> tuple[Tensor, Tensor]:
    """Output, and the attention weights: softmax(s W_k W_k^T) W_k of every subspace k, side by side, projected."""
    w = F.linear(z, state[f"{name}.qkv.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
    membership = torch.softmax(w @ w.mT * w.shape[-1] ** -0.5, dim=-1)
    attended = (membership @ w).transpose(1, 2).flatten(2)
    return F.linear(attended, state[f"{name}.to_out.0.weight"], state[f"{name}.to_out.0.bias"]), membership


def ista(x: Tensor, dictionary: Tensor) -> Tensor:
    """relu(X + eta (X D - X D^T D) - eta lambda), product by product."""
    rebuilt = x @ dictionary.T @ dictionary
    return torch.relu(x + STEP_SIZE * (x @ dictionary - rebuilt) - STEP_SIZE * THRESHOLD)


def encode(state: State, images: Tensor, hidden: Tensor, heads: int, record: dict[str, Tensor] | None = None) -> Tensor:
    """All tokens, the hidden ones too; every layer's output and attention weights go to `record`."""
    weight = state["patch_embed.proj.weight"]
    embedded = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    patches = torch.where(hidden[..., None], state["mask_token"], embedded.flatten(2).mT)
    z = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches], dim=1) + state["decoder_pos_embed"]
    for i in range(_depth(state, "blocks")):
        name = f"blocks.{i}.layers.0"
        step, membership = mssa(layer_norm(z, state, f"{name}.0.norm", 1e-5), state, f"{name}.0.fn", heads)
        z = ista(layer_norm(z + step, state, f"{name}.1.norm", 1e-5), state[f"{name}.1.fn.weight"])
        if record is not None:
            record |= {f"enc.{i}": z, f"attn.{i}": membership}
    return layer_norm(z, state, "norm", 1e-6)


def decode(state: State, latent: Tensor, heads: int, record: dict[str, Tensor] | None = None) -> Tensor:
    """The pixels of every patch; every layer's output goes to `record`."""
    y = latent
    for i in range(_depth(state, "decoder_blocks")):
        name = f"decoder_blocks.{i}.layers.0"
        half = F.linear(layer_norm(y, state, f"{name}.0.norm", 1e-5), state[f"{name}.0.fn.weight"])
        y = half - mssa(layer_norm(half, state, f"{name}.1.norm", 1e-5), state, f"{name}.1.fn", heads)[0]
        if record is not None:
            record[f"dec.{i}"] = y
    y = layer_norm(y, state, "decoder_norm", 1e-6)[:, 1:]
    return F.linear(y, state["decoder_pred.weight"], state["decoder_pred.bias"])


def pixels(state: State, images: Tensor) -> Tensor:
    """What is to be predicted: the numbers of every patch, row by row, channels last."""
    side = state["patch_embed.proj.weight"].shape[-1]
    return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the pixels of hidden patches."""
    return (((prediction - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()


def forward(state: State, images: Tensor, hidden: Tensor, heads: int) -> dict[str, Tensor]:
    """Prediction, latent, both losses, every layer's output and the encoder's attention weights."""
    results: dict[str, Tensor] = {}
    results["latent"] = latent = encode(state, images, hidden, heads, results)
    results["pred"] = prediction = decode(state, latent, heads, results)
    target = pixels(state, images)
    normal = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return results | {"loss": loss(prediction, target, hidden), "loss_norm_pix": loss(prediction, normal, hidden)}


class Reference(nn.Module):
    """The same as a module that can be trained: what an official state dict holds, and nothing that is never read.

    Args:
        state: official state dict.
        heads: of encoder and decoder.
    """

    def __init__(self, state: State, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Buffer(state["decoder_pos_embed"].clone())
        self._names = [name for name in state if name not in _UNUSED]
        self.tensors = nn.ParameterList(state[name].clone() for name in self._names)

    def state(self) -> dict[str, Tensor]:
        """Parameters and positions by their official names."""
        return dict(zip(self._names, self.tensors, strict=True)) | {"decoder_pos_embed": self.positions}

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The loss of masked images."""
        state = self.state()
        prediction = decode(state, encode(state, images, hidden, self.heads), self.heads)
        return loss(prediction, pixels(state, images), hidden)

    def features(self, images: Tensor) -> Tensor:
        """The encoder's output when nothing is hidden."""
        state = self.state()
        patches = state["decoder_pos_embed"].shape[1] - 1
        nothing = torch.zeros(len(images), patches, dtype=torch.bool, device=images.device)
        return encode(state, images, nothing, self.heads)


def _depth(state: State, stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
