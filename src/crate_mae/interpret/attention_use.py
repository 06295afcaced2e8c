"""Is attention used? What a network loses when tokens are no longer mixed, in one layer or in all of a part.

Attention without mixing is the step with P = I: every token attends to itself alone, and what is left is a map of each
token by itself. If the masked loss and a linear probe are the same without mixing, a layer's attention does nothing
for the task, whatever it does to R^c.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crate_mae.evaluation.probes import Score
from crate_mae.interpret.layer_measures import attention_of, has_subspaces
from crate_mae.interpret.statistics import place_of, statistic
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.features import evaluating
from crate_mae.models.tracing import layers_of


@dataclass(frozen=True)
class AttentionUse:
    """The network with attention that mixes nothing in some layers.

    Attributes:
        part: "encoder" or "decoder" where nothing is mixed; "" of the network as it is.
        layer: number of the layer; None for all of the part.
        loss: on hidden patches, mean over images.
        change: of the loss, paired over images.
        change_low: of its 95% interval (Student's t); None for one image.
        change_high: of the same.
        n: number of images.
        accuracy: of a linear probe of the encoder's last layer; None if there is none, or for a decoder.
        accuracy_low: of its 95% interval (Wilson's).
        accuracy_high: of the same.
    """

    part: str
    layer: int | None
    loss: float
    change: float
    change_low: float | None
    change_high: float | None
    n: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None


@contextmanager
def without_mixing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have the attention of these layers mix no tokens (P = I); afterwards, however it ends, they are as they were."""

    def alone(attn: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        w = attn.project(inputs[0])
        return attn.step(w, w)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(attention_of(layer).register_forward_hook(alone))
        yield


def attention_use(
    net: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    masks: Bool[Tensor, "b n"],
    *,
    probe: Callable[[], Score] | None = None,
    batch_size: int = 32,
) -> list[AttentionUse]:
    """The masked loss and a probe of the network as it is, then without mixing in each layer and in each whole part.

    Args:
        net: a model with attention in subspaces; of any other, nothing is found.
        images: normalised.
        masks: true = hidden, the same for all.
        probe: fits and judges a linear probe of the encoder as it is at the time.
        batch_size: images that go through the model at once.
    """
    parts: dict[str, dict[int, nn.Module]] = {}
    for name, layer in layers_of(net).items():
        if has_subspaces(layer):
            part, number = place_of(name)
            parts.setdefault(part, {})[number] = layer
    if not parts:
        return []
    chosen: list[tuple[str, int | None, Sequence[nn.Module]]] = [("", None, [])]
    for part, layers in parts.items():
        chosen += [(part, number, [layer]) for number, layer in layers.items()]
        chosen += [(part, None, list(layers.values()))]
    intact = image_losses(net, images, masks, batch_size)
    found = []
    for part, number, layers in chosen:
        with without_mixing(layers):
            losses = image_losses(net, images, masks, batch_size) if layers else intact
            score = probe() if probe is not None and part != "decoder" else None
        change = statistic(losses - intact)
        low, high = (None, None) if change.spread is None else change.interval()
        accuracy = (None, None, None) if score is None else astuple(score)
        found.append(AttentionUse(part, number, float(losses.mean()), change.mean, low, high, change.n, *accuracy))
    return found


def image_losses(
    net: MaskedAutoencoder, images: Float[Tensor, "b c hh ww"], masks: Bool[Tensor, "b n"], batch_size: int
) -> Float[Tensor, "b"]:
    """The loss of each image, in float64."""
    device = next(net.parameters()).device
    found = []
    with evaluating(net):
        for batch, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True):
            batch, mask = batch.to(device), mask.to(device)
            prediction = net(batch, mask=mask).prediction
            singles = (net.loss(batch[i : i + 1], prediction[i : i + 1], mask[i : i + 1]) for i in range(len(batch)))
            found += [torch.stack(list(singles))]
    return torch.cat(found).double().cpu()
