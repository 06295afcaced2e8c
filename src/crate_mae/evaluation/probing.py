"""From a model and labelled images to the results of a probe for each layer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crate_mae.data import BadImage, ImageSource, full_name, open_source, refuse_shared_images
from crate_mae.data.base import align_classes, aligned_labels
from crate_mae.evaluation.backbones import Backbone, open_backbone
from crate_mae.evaluation.extract import Extraction, Features, extract

# (training features, validation features, names of the classes) to results
Probe = Callable[[Features, Features, list[str]], Sequence[Any]]
Extractor = Callable[[Backbone, ImageSource, Extraction], list[Features]]

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
    """

    backbone: Backbone
    train: str
    val: str
    images: tuple[int, int]
    classes: list[str]
    pooling: str
    rows: list[tuple[int, Any]]
    bad: tuple[BadImage, ...]

    def report(self, **settings: Any) -> dict[str, Any]:
        """The content of a JSON file: results, model, data, settings and versions."""
        return {
            "model": self.backbone.name,
            "fresh_weights": self.backbone.is_random,
            "train": self.train,
            "val": self.val,
            "train_images": self.images[0],
            "val_images": self.images[1],
            "left_out": [tuple(bad) for bad in self.bad],
            "classes": self.classes,
            "image_size": self.backbone.image_size,
            "pooling": self.pooling,
            **settings,
            "results": [{"layer": layer, **asdict(result)} for layer, result in self.rows],
            "versions": versions(),
        }


def probe(
    model: Any,
    train: Any,
    val: Any,
    run: Probe,
    *,
    extraction: Extraction,
    seed: int = 0,
    extractor: Extractor = extract,
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

    Raises:
        UserError: for a mistake in the model, data or labels.
    """
    sources = (open_source(train), open_source(val))
    refuse_shared_images(*sources, "--train", "a probe would be measured on images that it was fitted on")
    backbone = open_backbone(model, seed=seed)
    train_layers, val_layers = (extractor(backbone, source, extraction) for source in sources)
    rows: list[tuple[int, Any]] = []
    classes: list[str] = []
    for train_features, val_features in zip(train_layers, val_layers, strict=True):
        classes = align_classes(train_features, val_features)
        learned, measured = (
            replace(features, labels=aligned_labels(features, classes), classes=classes)
            for features in (train_features, val_features)
        )
        rows += [(train_features.layer, result) for result in run(learned, measured, classes)]
    train_features, val_features = train_layers[0], val_layers[0]
    return Probed(
        backbone=backbone,
        train=data_name(train, sources[0]),
        val=data_name(val, sources[1]),
        images=(len(train_features.values), len(val_features.values)),
        classes=classes,
        pooling=train_features.pooling,
        rows=rows,
        bad=train_features.bad + val_features.bad,
    )


def data_name(data: Any, source: ImageSource) -> str:
    """The name of data in a report, which opens it from any folder."""
    return full_name(data) if isinstance(data, (str, Path)) else source.name


def versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {package: version(package) for package in _PACKAGES}
