"""From a model and labelled images to the results of a probe for each layer, beside those of its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from crate_mae.data import BadImage, ImageSource, full_name, open_source, refuse_shared_images
from crate_mae.data.base import align_classes, aligned_labels
from crate_mae.evaluation.backbones import PIXELS, Backbone, RawPixels, open_backbone
from crate_mae.evaluation.embeddings import describe_alike
from crate_mae.evaluation.extract import AFFORDABLE, Extraction, Features, extract
from crate_mae.evaluation.probes import Score, wilson_interval
from crate_mae.models.classifier import untrained
from crate_mae.models.config import ClassifierConfig, ModelConfig
from crate_mae.models.features import DEFAULT_LAYER, depth
from crate_mae.models.weights import UNTRAINED, unwrapped

# (training features, validation features, names of the classes) to results
Probe = Callable[[Features, Features, list[str]], Sequence[Any]]
Extractor = Callable[[Backbone, ImageSource, Extraction], list[Features]]

# Numbers in the features of all layers of all training images, up to which all layers are probed by default. A linear
# probe of 10 classes takes about two minutes of one core for so many, which are 0.8 GB.
MOST_NUMBERS = 200_000_000

_PACKAGES = ("crate-mae", "torch", "timm", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The results of a probe.

    Attributes:
        backbone: whose features were probed.
        train: name of the training images.
        val: name of the validation images.
        images: numbers of training and validation images.
        classes: names of the classes.
        pooling: how tokens were pooled to features.
        rows: (layer, result) pairs.
        bad: images that could not be read.
        chance: the share of validation images that are of the most frequent class of the training images.
        hint: about features that point almost the same way; empty if they do not.
        controls: the same probe of the same architecture with random initialisation, and of raw pixels.
    """

    backbone: Backbone
    train: str
    val: str
    images: tuple[int, int]
    classes: list[str]
    pooling: str
    rows: list[tuple[int, Any]]
    bad: tuple[BadImage, ...]
    chance: Score
    hint: str = ""
    controls: tuple[Probed, ...] = ()

    def chosen(self) -> tuple[int, Any]:
        """The layer, with its result, that is best on the tenth of the training images that is kept for such choices.

        Where that is not measured, it is the last row.
        """
        return max(self.rows[::-1], key=lambda row: row[1].chosen_on or 0.0)

    def report(self, **settings: Any) -> dict[str, Any]:
        """The content of a JSON file: results, model, data, settings and versions."""
        return {
            "model": self.backbone.name,
            "random_initialisation": self.backbone.is_random,
            "train": self.train,
            "val": self.val,
            "train_images": self.images[0],
            "val_images": self.images[1],
            "left_out": [tuple(bad) for bad in self.bad],
            "classes": self.classes,
            "image_size": self.backbone.image_size,
            "pooling": self.pooling,
            **settings,
            "results": self._results(),
            "chance": asdict(self.chance),
            "controls": [
                {
                    "model": control.backbone.name,
                    "random_initialisation": control.backbone.is_random,
                    "pooling": control.pooling,
                    "results": control._results(),
                }
                for control in self.controls
            ],
            "versions": versions(),
        }

    def _results(self) -> list[dict[str, Any]]:
        return [{"layer": layer, **asdict(result)} for layer, result in self.rows]


def probe(
    model: Any,
    train: Any,
    val: Any,
    run: Probe,
    *,
    extraction: Extraction,
    seed: int = 0,
    extractor: Extractor = extract,
    with_controls: bool = False,
) -> Probed:
    """Extract the features of labelled images, and run a probe on each wanted layer.

    Args:
        model: any form that `open_backbone` takes.
        train: labelled images to fit the probe on.
        val: labelled images to measure it on.
        run: the probe.
        extraction: how to extract features.
        seed: of a random initialisation.
        extractor: `extract`, or a function that also shows its progress.
        with_controls: whether to probe the controls of the model too.

    Raises:
        UserError: for a mistake in the model, data or labels.
    """
    sources = (open_source(train), open_source(val))
    refuse_shared_images(*sources, "--train", "a probe would be measured on images that it was fitted on")
    names = (data_name(train, sources[0]), data_name(val, sources[1]))

    def probed(backbone: Backbone, how: Extraction) -> Probed:
        return _probe(backbone, sources, names, run, _with_affordable_layers(how, backbone, sources[0]), extractor)

    backbone = open_backbone(model, seed=seed)
    found = probed(backbone, extraction)
    if not with_controls:
        return found
    controls = [probed(control, extraction) for control in _untrained(model, backbone, seed)]
    if not isinstance(backbone.encoder, RawPixels):
        controls.append(probed(open_backbone(PIXELS), replace(extraction, layers=(DEFAULT_LAYER,), pooling=None)))
    return replace(found, controls=tuple(controls))


def _untrained(model: Any, backbone: Backbone, seed: int) -> list[Backbone]:
    """The same architecture with random initialisation, if this library can build it."""
    if backbone.is_random or isinstance(backbone.encoder, RawPixels):
        return []
    if not isinstance(model, nn.Module):
        return [open_backbone(f"{model}{UNTRAINED}", seed=seed)]
    config = getattr(unwrapped(model), "config", None)
    if not isinstance(config, ModelConfig | ClassifierConfig):
        return []
    twin = open_backbone(untrained(config, seed))
    return [replace(twin, name=f"{backbone.name}{UNTRAINED}", is_random=True, is_borrowed=False)]


def _with_affordable_layers(how: Extraction, backbone: Backbone, train: ImageSource) -> Extraction:
    if how.layers != AFFORDABLE:
        return how
    width = getattr(backbone.encoder, "num_features", 0) * (2 if how.pooling_of(backbone) == "cls+mean" else 1)
    is_cheap = len(train) * width * depth(backbone.encoder) <= MOST_NUMBERS
    return replace(how, layers="all" if is_cheap else (DEFAULT_LAYER,))


def _probe(
    backbone: Backbone,
    sources: tuple[ImageSource, ImageSource],
    names: tuple[str, str],
    run: Probe,
    extraction: Extraction,
    extractor: Extractor,
) -> Probed:
    train_layers, val_layers = (extractor(backbone, source, extraction) for source in sources)
    classes = align_classes(train_layers[0], val_layers[0])
    train_labels, val_labels = (aligned_labels(layers[0], classes) for layers in (train_layers, val_layers))
    rows: list[tuple[int, Any]] = []
    for train, val in zip(train_layers, val_layers, strict=True):
        learned = replace(train, labels=train_labels, classes=classes)
        measured = replace(val, labels=val_labels, classes=classes)
        rows += [(train.layer, result) for result in run(learned, measured, classes)]
    most_frequent = np.bincount(train_labels).argmax()
    return Probed(
        backbone=backbone,
        train=names[0],
        val=names[1],
        images=(len(train_labels), len(val_labels)),
        classes=classes,
        pooling=train_layers[0].pooling,
        rows=rows,
        bad=train_layers[0].bad + val_layers[0].bad,
        chance=wilson_interval(int((val_labels == most_frequent).sum()), len(val_labels)),
        hint=describe_alike(val_layers[-1]),
    )


def data_name(data: Any, source: ImageSource) -> str:
    """The name of data in a report, which opens it from any folder."""
    return full_name(data) if isinstance(data, (str, Path)) else source.name


def versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {package: version(package) for package in _PACKAGES}
