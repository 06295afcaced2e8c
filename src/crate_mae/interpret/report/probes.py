"""Linear probes of every layer, as rows like any other measure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from crate_mae.data import ImageSource, Part, label_names
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone
from crate_mae.evaluation.extract import Extraction
from crate_mae.evaluation.probes import Score, refuse_small_classes
from crate_mae.interpret.depth import LayerProbe, probe_layers
from crate_mae.interpret.statistics import Row

ACCURACY = "probe_accuracy"
_GRID = (1e-3, 1e-2, 1e-1)  # of C; on features of CIFAR-10 the best was inside in every trial


class ProbeImages(NamedTuple):
    """Labelled images for probes, whose labels mean the same in both.

    Attributes:
        train: to fit on.
        test: to judge by.
        classes: how many there are.
    """

    train: ImageSource
    test: ImageSource
    classes: int


def probe_images(train: ImageSource, test: ImageSource, most: int, seed: int) -> ProbeImages:
    """Choose at most `most` labelled images of each source, and number their classes alike.

    Raises:
        UserError: without labels, with one class, with a class that only the test images have, or with a class of a
            single training image.
    """
    chosen = [_labelled(source, most, seed) for source in (train, test)]
    (_, train_names), (_, test_names) = chosen
    classes = sorted(set(train_names))
    if strange := sorted(set(test_names) - set(classes)):
        raise UserError(f"{test.name} has classes that {train.name} lacks, such as {strange[0]}.")
    if len(classes) < 2:
        raise UserError(f"All images of {train.name} are of one class ({classes[0]}): there is nothing to tell apart.")
    number = {name: i for i, name in enumerate(classes)}
    labels = [np.array([number[name] for name in names], dtype=np.int64) for _, names in chosen]
    refuse_small_classes(labels[0], 2, classes)
    fitted, judged = (
        Part(source, indices, labels=found)
        for source, (indices, _), found in zip((train, test), chosen, labels, strict=True)
    )
    return ProbeImages(fitted, judged, len(classes))


def split_probe_images(source: ImageSource, most: int, seed: int) -> ProbeImages:
    """At most `most` labelled images of one source, a pseudo-random half to fit on, the other half to judge by.

    Raises:
        UserError: without labels, with one class, or with a class of a single image to fit on.
    """
    indices, names = _labelled(source, most, seed)
    order = np.random.default_rng(seed).permutation(len(indices))
    classes = sorted(set(names))
    if len(classes) < 2:
        raise UserError(f"All images of {source.name} are of one class ({classes[0]}): there is nothing to tell apart.")
    labels = np.array([classes.index(name) for name in names], dtype=np.int64)
    parts = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    refuse_small_classes(labels[parts[0]], 2, classes)
    if strange := set(labels[parts[1]]) - set(labels[parts[0]]):
        raise UserError(f"Class {classes[min(strange)]} of {source.name} has too few images for a probe.")
    fitted, judged = (Part(source, indices[part], labels=labels[part]) for part in parts)
    return ProbeImages(fitted, judged, len(classes))


def last_layer_score(backbone: Backbone, images: ProbeImages) -> Score:
    """Accuracy of a linear classifier on the last layer of the encoder."""
    return _probes(backbone, images, (-1,))[0].top1


def probe_rows(backbone: Backbone, images: ProbeImages) -> tuple[list[Row], bool]:
    """Accuracy of a linear classifier on each layer of the encoder, and whether every fit converged."""
    probes = _probes(backbone, images, "all")
    n = len(images.test)
    rows = []
    for probe in probes:
        share = probe.top1.value
        spread = math.sqrt(share * (1 - share) * n / (n - 1)) if n > 1 else None  # of rights and wrongs, 1 and 0
        rows.append(Row("encoder", probe.layer, ACCURACY, "", share, spread, n, "images"))
    return rows, all(probe.converged for probe in probes)


def _probes(backbone: Backbone, images: ProbeImages, layers: Sequence[int] | str) -> list[LayerProbe]:
    extraction = Extraction(layers=layers, cache=False)
    device = next(backbone.encoder.parameters()).device
    try:
        return probe_layers(backbone, images.train, images.test, grid=_GRID, extraction=extraction)
    finally:
        backbone.encoder.to(device)  # which extraction takes to an accelerator, away from its decoder


def _labelled(source: ImageSource, most: int, seed: int) -> tuple[Int[np.ndarray, "n"], Sequence[str]]:
    """Numbers and class names of a pseudo-random choice of the images that have a label."""
    names = label_names(source)
    known = [i for i, name in enumerate(names or []) if name is not None]
    if names is None or not known:
        raise UserError(f"{source.name} has no labels, and a linear probe needs them.")
    if len(known) > most:
        known = sorted(np.random.default_rng(seed).choice(known, most, replace=False).tolist())
    return np.array(known, dtype=np.int64), [str(names[i]) for i in known]
