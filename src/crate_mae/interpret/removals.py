"""What matters in a network: a subspace or an atom is removed, and what is lost is compared with removing at random.

A measure of a layer says what it does, not whether that is of use. Here a part's contribution is taken away while the
network runs (`models.interventions`), and two things are measured: the loss of masked completion, and the accuracy of
a classifier that was fitted to the features of the intact network, once.

Removing anything at all from a network costs something, so every part has controls of the same size: for a head, its
layer's step less its projection onto a random subspace of equal dimension; for an atom, its activations taken from a
random direction of the code instead of its own. What a part costs beyond its controls is due to what it stands for.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import LogisticRegression, linear_probe
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret.attention_use import image_losses
from crate_mae.interpret.audit import p_value
from crate_mae.interpret.information import PROBE_STRENGTHS, ProbeImages
from crate_mae.interpret.statistics import place_of, statistic
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.features import encode, evaluating
from crate_mae.models.interventions import Change, intervene, places_of
from crate_mae.models.tracing import layers_of, trace


class Probe(NamedTuple):
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
        share: of the squared length of the layer's step (of the code) that is the part's own, over images and tokens.
        loss: change of the loss of masked completion, mean over images.
        random_loss: the same for the controls, mean over draws and images.
        beyond: the first less the second, paired over images; above 0, the part matters more than a random one.
        beyond_low: of its 95% interval (Student's t).
        beyond_high: of the same.
        p: one-sided, of the t-test that `beyond` is above 0, for this part alone.
        accuracy: change of the classifier's accuracy; None without labels, or in a decoder.
        random_accuracy: the same for the controls.
        worst_class: the class that loses most.
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


def fitted_probe(backbone: Backbone, images: ProbeImages) -> Probe:
    """Fit a linear classifier to features of the encoder's last layer, and read the images to classify."""
    train, test = images
    how = Extraction(layers=(-1,), cache=False)
    (fitted,), (asked,) = extract(backbone, train, how), extract(backbone, test, how)
    assert fitted.labels is not None and asked.labels is not None, "images of probes have labels"
    scaler = StandardScaler().fit(fitted.values)
    c = linear_probe(fitted.values, fitted.labels, asked.values, asked.labels, grid=PROBE_STRENGTHS).c
    fit = LogisticRegression(np.asarray(scaler.transform(fitted.values)), fitted.labels).fit(c)
    read = read_images(test, backbone.transform(), range(len(test)), len(test)).images

    def classify() -> Int[Tensor, "k"]:
        with evaluating(backbone.encoder):
            batches = [encode(backbone.encoder, batch, pooling=how.pooling_of(backbone)) for batch in read.split(64)]
        features = np.asarray(scaler.transform(torch.cat(batches).cpu().numpy()))
        return torch.as_tensor(fit.classes[fit.logits(features).argmax(axis=1)])

    return Probe(classify, torch.as_tensor(asked.labels), test.classes or [])


def removals(
    net: MaskedAutoencoder,
    images: Float[Tensor, "b c hh ww"],
    masks: Bool[Tensor, "b n"],
    *,
    probe: Probe | None = None,
    atoms: int = 16,
    draws: int = 3,
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
        draws: random subspaces, or directions, per part.
        seed: of both.
        batch_size: images that go through the model at once.
        on_start: called with the seconds that all will take, judged by one pass.

    Raises:
        UserError: for a single image, which has no interval.
    """
    if len(images) < 2:
        raise UserError("Removals are judged by an interval over images: give at least two.")
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(net, images, masks, atoms, generator, batch_size)

    def measured(changes: Mapping[str, Change], *, in_encoder: bool = True) -> _Measured:
        with intervene(net, changes):
            losses = image_losses(net, images, masks, batch_size)
            return losses, None if probe is None or not in_encoder else probe.classify() == probe.labels

    started = time.perf_counter()
    intact = measured({})
    if on_start is not None:
        on_start((time.perf_counter() - started) * len(parts) * (1 + draws))
    found = []
    for part in parts:
        in_encoder = part.place[0] == "encoder"
        without = measured(part.removed, in_encoder=in_encoder)
        controls = [measured(part.control(generator), in_encoder=in_encoder) for _ in range(draws)]
        found.append(_removal(part, intact, without, controls, probe))
    return found


class _Part(NamedTuple):
    """A head or an atom: how it is removed, and how something random of its size is."""

    place: tuple[str, int]
    kind: str
    number: int
    share: float
    removed: dict[str, Change]
    control: Callable[[torch.Generator], dict[str, Change]]


# Losses of images, and whether others are classified right.
_Measured = tuple[Float[Tensor, "b"], Bool[Tensor, "k"] | None]


def _parts(
    net: MaskedAutoencoder, images: Tensor, masks: Tensor, atoms: int, generator: torch.Generator, batch_size: int
) -> list[_Part]:
    """All heads, and the chosen atoms."""
    found = []
    for name, share in _shares(net, images, masks, batch_size).items():
        layer, _, kind = name.rpartition(".")
        if kind == "head_steps":
            found += [_head(layer, k, share) for k in range(len(share))]
        else:
            found += [_atom(layer, j, share) for j in _chosen_atoms(share, atoms, generator)]
    return found


def _shares(net: MaskedAutoencoder, images: Tensor, masks: Tensor, batch_size: int) -> dict[str, Float[Tensor, "m"]]:
    """The share of each head in its layer's steps, and of each atom in its code, of the squared length."""
    kinds = {"head_steps": (0, 2, 3), "code": (0, 1)}  # and the axes that are summed over
    names = [f"{name}.{kind}" for name, layer in layers_of(net).items() for kind in kinds if kind in places_of(layer)]
    energy: dict[str, Tensor] = {}
    device = next(net.parameters()).device
    with evaluating(net), trace(net, names) as seen:
        for batch, mask in zip(images.split(batch_size), masks.split(batch_size), strict=True):
            net(batch.to(device), mask=mask.to(device))
            for name in names:
                found = seen[name].pop().double().square().sum(kinds[name.rpartition(".")[2]]).cpu()
                energy[name] = energy.get(name, 0) + found
    return {name: found / found.sum() for name, found in energy.items()}


def _head(layer: str, k: int, share: Float[Tensor, "h"]) -> _Part:
    def control(generator: torch.Generator) -> dict[str, Change]:
        def without_random_subspace(step: Tensor) -> Tensor:
            d, seeded = step.shape[-1], torch.Generator().manual_seed(seed)
            basis = torch.linalg.qr(torch.randn(d, d // len(share), generator=seeded)).Q.to(step)
            return step - step @ basis @ basis.T

        seed = int(torch.randint(2**31, (), generator=generator))  # every batch meets the same subspace
        return {f"{layer}.attn": without_random_subspace}

    name = f"{layer}.head_steps[{k}]"
    return _Part(place_of(layer), "head", k, float(share[k]), {name: 0.0}, control)


def _atom(layer: str, j: int, share: Float[Tensor, "m"]) -> _Part:
    def control(generator: torch.Generator) -> dict[str, Change]:
        direction = F.normalize(torch.randn(len(share), generator=generator), dim=0)
        return {f"{layer}.code": lambda code: code - code[..., j : j + 1] * direction.to(code)}

    name = f"{layer}.code[{j}]"
    return _Part(place_of(layer), "atom", j, float(share[j]), {name: 0.0}, control)


def _chosen_atoms(share: Float[Tensor, "m"], count: int, generator: torch.Generator) -> list[int]:
    """Half of them the largest, half at random from the others."""
    order = share.argsort(descending=True)
    largest, others = order[: math.ceil(count / 2)], order[math.ceil(count / 2) :]
    return [*largest.tolist(), *others[torch.randperm(len(others), generator=generator)[: count // 2]].tolist()]


def _removal(
    part: _Part, intact: _Measured, without: _Measured, controls: Sequence[_Measured], probe: Probe | None
) -> Removal:
    change = without[0] - intact[0]
    random = torch.stack([losses for losses, _ in controls]).mean(0) - intact[0]
    beyond = statistic(change - random)
    found = Removal(
        *part.place,
        part.kind,
        part.number,
        part.share,
        float(change.mean()),
        float(random.mean()),
        beyond.mean,
        *beyond.interval(),
        p_value(beyond),
    )
    if probe is None or without[1] is None or intact[1] is None:
        return found
    gained = without[1].double() - intact[1].double()
    right_at_random = torch.stack([right for _, right in controls if right is not None])
    by_class = {int(c): float(gained[probe.labels == c].mean()) for c in probe.labels.unique()}
    worst = min(by_class, key=by_class.__getitem__)
    return replace(
        found,
        accuracy=float(gained.mean()),
        random_accuracy=float((right_at_random.double() - intact[1].double()).mean()),
        worst_class=probe.names[worst],
        worst_class_accuracy=by_class[worst],
    )
