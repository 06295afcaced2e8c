"""What matters in a network: attention, a subspace or an atom is taken away, and what is lost is measured.

A measure of a layer says what it does, not whether it is useful. Here a part's contribution is taken away while the
network runs, and two things are measured: the loss of masked completion, and the accuracy of a classifier.

Attention without mixing is the step with P = I: every token attends to itself alone, and what is left is a map of each
token by itself. If the masked loss and a linear probe are the same without mixing, a layer's attention does nothing
for the task, regardless of its effect on R^c.

A single subspace or atom is removed by `models.interventions`, and the classifier was fitted once, to features of the
intact network.

Removing anything at all costs something, so every part is compared with random draws of the same size: a head with
random subspaces of its dimension, which are projected out of its layer's step; an atom with random sets of other atoms
that have as large a share of the code together. Draws differ among each other, and a part counts only if it costs more
than another draw would. All this is about the images at hand, whose number enters no interval.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from crate_mae.data.numbers import check_whole
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import Score, fit_linear
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.audit import LARGEST_P, holm, p_value
from crate_mae.interpret.information import PROBE_STRENGTHS, ProbeImages
from crate_mae.interpret.layer_measures import attention_of, bases, has_subspaces
from crate_mae.interpret.statistics import Statistic, place_of, statistic
from crate_mae.interpret.weights import output_projections
from crate_mae.models.autoencoder import MaskedAutoencoder, patch_errors
from crate_mae.models.features import encode, evaluating
from crate_mae.models.interventions import Change, intervene, places_of
from crate_mae.models.masking import mean_over_hidden
from crate_mae.models.tracing import layers_of, trace


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
            found.append(mean_over_hidden(patch_errors(net.config, batch, prediction), mask))
    return torch.cat(found).double().cpu()


class FittedProbe(NamedTuple):
    """A classifier that is fitted once, and images that it has not seen.

    Attributes:
        classify: classes of these images, from features of the network as it is at the time.
        labels: their true classes.
        names: of the classes.
    """

    classify: Callable[[], Int[Tensor, "k"]]
    labels: Int[Tensor, "k"]
    names: Sequence[str]


@dataclass(frozen=True)
class Removal:
    """What a network loses without one part.

    Attributes:
        part: "encoder" or "decoder".
        layer: number of the layer.
        kind: "head" or "atom".
        index: of the head, or of the atom.
        share: of an atom, of the squared length of its layer's code; of a head, of the sum over heads of the squared
            lengths of their steps.
        loss: change of the loss of masked completion, mean over images.
        random_loss: the same for the draws, mean over them.
        beyond: the first less the second; above 0, the part costs more than the average draw.
        beyond_low: of the 95% interval in which the difference from one more draw lies (Student's t over draws).
        beyond_high: of the same.
        p: one-sided, that one more draw costs as much as the part.
        accuracy: change of the classifier's accuracy; None without labels, or in a decoder.
        random_accuracy: the same for the draws, mean over them.
        worst_class: the class that loses most; the minimum of many values is low by chance.
        worst_class_accuracy: change of the accuracy on this class.
    """

    part: str
    layer: int
    kind: str
    index: int
    share: float
    loss: float
    random_loss: float
    beyond: float
    beyond_low: float
    beyond_high: float
    p: float
    accuracy: float | None = None
    random_accuracy: float | None = None
    worst_class: str | None = None
    worst_class_accuracy: float | None = None


def fitted_probe(backbone: Backbone, images: ProbeImages) -> FittedProbe:
    """Fit a linear classifier to features of the encoder's last layer, and read the images to classify."""
    train, val = images
    how = Extraction(layers=(-1,), cache=False)
    (fitted,), (asked,) = extract(backbone, train, how), extract(backbone, val, how)
    assert fitted.labels is not None and asked.labels is not None, "images of probes have labels"
    fit, scaler, *_ = fit_linear(fitted.values, fitted.labels, grid=PROBE_STRENGTHS)
    read = read_images(val, backbone.transform(), range(len(val)), len(val)).images

    def classify() -> Int[Tensor, "k"]:
        with evaluating(backbone.encoder):
            batches = [encode(backbone.encoder, batch, pooling=how.pooling_of(backbone)) for batch in read.split(64)]
        features = np.asarray(scaler.transform(torch.cat(batches).cpu().numpy()))
        return torch.as_tensor(fit.classes[fit.logits(features).argmax(axis=1)])

    return FittedProbe(classify, torch.as_tensor(asked.labels), val.classes or [])


def removals(
    net: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    masks: Bool[Tensor, "b n"],
    *,
    probe: FittedProbe | None = None,
    atoms: int = 16,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    on_start: Callable[[float], None] | None = None,
) -> list[Removal]:
    """Remove each head, and atoms of each code, one at a time.

    Args:
        net: any of our autoencoders; of a ViT-MAE, which has no codes, the heads are removed.
        images: normalised; the loss is measured on them.
        masks: true = hidden.
        probe: to measure accuracy as well.
        atoms: how many of each layer's code; half of them those with the most energy, half at random from the others.
        draws: random subspaces of each layer with heads, random sets of atoms for each atom; at least two.
        seed: of the atoms and of the draws.
        batch_size: images that go through the model at once.
        on_start: called with the estimated time of everything in seconds, from that of one pass.

    Raises:
        UserError: for fewer than two draws, which have no spread, or a negative number of atoms.
    """
    check_whole("draws", draws, 2)
    check_whole("atoms", atoms, 0)
    generator = torch.Generator().manual_seed(seed)
    shares = _shares(net, images, masks, batch_size)

    def measured(changes: Mapping[str, Change], *, in_encoder: bool = True) -> _Measured:
        with intervene(net, changes):
            losses = image_losses(net, images, masks, batch_size)
            return _Measured(losses, None if probe is None or not in_encoder else probe.classify() == probe.labels)

    started = time.perf_counter()
    intact = measured({})
    if on_start is not None:
        heads = sum(len(share) + draws for (_, kind), share in shares.items() if kind == "head_steps")
        codes = sum(min(atoms, len(share)) * (1 + draws) for (_, kind), share in shares.items() if kind == "code")
        on_start((time.perf_counter() - started) * (heads + codes))
    found = []
    for (layer, kind), share in shares.items():
        in_encoder = place_of(layer)[0] == "encoder"
        numbers = range(len(share)) if kind == "head_steps" else chosen_atoms(share, atoms, generator)
        controls: list[_Measured] = []
        for number in numbers:
            if kind == "code" or not controls:  # the heads of a layer share their draws
                drawn = [_at_random(net, layer, kind, share, number, generator) for _ in range(draws)]
                controls = [measured(changes, in_encoder=in_encoder) for changes in drawn]
            without = measured({f"{layer}.{kind}[{number}]": 0.0}, in_encoder=in_encoder)
            kept = float(share[number])
            found.append(_removal(place_of(layer), kind, number, kept, intact, without, controls, probe))
    return found


def mattering(found: Sequence[Removal]) -> list[Removal]:
    """Those that cost more than one more random draw would, with p < 0.05 after Holm's correction over all."""
    corrected = holm([each.p for each in found])
    return [each for each, p in zip(found, corrected, strict=True) if each.beyond > 0 and p < LARGEST_P]


class _Measured(NamedTuple):
    """Losses of images, and whether those of the probe are classified right."""

    losses: Float[Tensor, "b"]
    right: Bool[Tensor, "k"] | None


def _shares(
    net: MaskedAutoencoder, images: Tensor, masks: Tensor, batch_size: int
) -> dict[tuple[str, str], Float[Tensor, "m"]]:
    """The share of each head in the steps of its layer, and of each atom in its code, of the squared length.

    By the names of the layers, and "head_steps" or "code".
    """
    layers = layers_of(net)
    places = [(at, kind) for at, layer in layers.items() for kind in ("head_steps", "code") if kind in places_of(layer)]
    energy: dict[tuple[str, str], Tensor] = {}
    device = next(net.parameters()).device
    with evaluating(net), trace(net, [f"{layer}.{kind}" for layer, kind in places]) as seen:
        for batch, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True):
            net(batch.to(device), mask=mask.to(device))
            for layer, kind in places:
                value = seen[f"{layer}.{kind}"].pop().double()
                if kind == "code":
                    found = value.square().sum((0, 1))
                else:  # ||S_k O_k^T||^2 = <S_k^T S_k, O_k^T O_k>, S_k the step in the coordinates of the subspace
                    outputs = _outputs(layers[layer]).double()
                    found = (torch.einsum("bhnp,bhnq->hpq", value, value) * (outputs.mT @ outputs)).sum((1, 2))
                energy[layer, kind] = energy.get((layer, kind), 0) + found.cpu()
    return {place: found / found.sum().clamp_min(torch.finfo(found.dtype).tiny) for place, found in energy.items()}


def _outputs(layer: nn.Module) -> Float[Tensor, "h d p"]:
    """From the coordinates of each head's step to tokens: U_k, or W_k of a free output projection."""
    w = output_projections(layer)
    return bases(layer) if w is None else w


def _at_random(
    net: MaskedAutoencoder, layer: str, kind: str, share: Float[Tensor, "m"], number: int, generator: torch.Generator
) -> dict[str, Change]:
    """Remove something random that is as large as a head, or as an atom."""
    if kind == "code":
        keep = torch.ones(len(share))
        keep[_other_atoms(share, number, generator)] = 0
        return {f"{layer}.code": lambda code: code * keep.to(code)}
    attn: Any = net.get_submodule(layer).get_submodule("attn")
    d = _outputs(net.get_submodule(layer)).shape[1]
    basis = torch.linalg.qr(torch.randn(d, d // len(share), generator=generator)).Q
    bias = getattr(getattr(attn, "proj", None), "bias", None)  # which no head removes either

    def without_subspace(step: Tensor) -> Tensor:
        q = basis.to(step)
        return step - (step if bias is None else step - bias) @ q @ q.T

    return {f"{layer}.attn": without_subspace}


def _other_atoms(share: Float[Tensor, "m"], atom: int, generator: torch.Generator) -> list[int]:
    """Other atoms in random order, as many as fit into the share of this one; if none does, the one nearest to it."""
    left, chosen = float(share[atom]), []
    order = [i for i in torch.randperm(len(share), generator=generator).tolist() if i != atom]
    for i in order:
        if 0 < share[i] <= left:
            chosen.append(i)
            left -= float(share[i])
    if share[atom] > 0 and not chosen:
        chosen = [min(order, key=lambda i: abs(float(share[i] - share[atom])))]
    return chosen


def chosen_atoms(share: Float[Tensor, "m"], count: int, generator: torch.Generator) -> list[int]:
    """Half of them the largest, half at random from the others."""
    order = share.argsort(descending=True)
    largest, others = order[: math.ceil(count / 2)], order[math.ceil(count / 2) :]
    return [*largest.tolist(), *others[torch.randperm(len(others), generator=generator)[: count // 2]].tolist()]


def _removal(
    place: tuple[str, int],
    kind: str,
    number: int,
    share: float,
    intact: _Measured,
    without: _Measured,
    controls: Sequence[_Measured],
    probe: FittedProbe | None,
) -> Removal:
    loss = float((without.losses - intact.losses).mean())
    random = statistic(torch.stack([(control.losses - intact.losses).mean() for control in controls]))
    beyond, spread = loss - random.mean, (random.spread or 0.0) * math.sqrt(1 + 1 / random.n)  # of one more draw
    one_more = Statistic(beyond, spread * math.sqrt(random.n), random.n)  # whose interval divides by the root again
    name = {"head_steps": "head", "code": "atom"}[kind]
    found = Removal(*place, name, number, share, loss, random.mean, beyond, *one_more.interval(), p_value(one_more))
    if probe is None or without.right is None or intact.right is None:
        return found
    gained = without.right.double() - intact.right.double()
    right_at_random = torch.stack([control.right for control in controls if control.right is not None])
    by_class = {int(c): float(gained[probe.labels == c].mean()) for c in probe.labels.unique()}
    worst = min(by_class, key=by_class.__getitem__)
    return replace(
        found,
        accuracy=float(gained.mean()),
        random_accuracy=float((right_at_random.double() - intact.right.double()).mean()),
        worst_class=probe.names[worst],
        worst_class_accuracy=by_class[worst],
    )
