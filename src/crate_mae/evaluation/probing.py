"""From a model and labelled images to the scores of a probe, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crate_mae.data import BadImage, ImageSource, full_name, open_source, same_images
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import Backbone, open_backbone
from crate_mae.evaluation.extract import Extraction, Features, extract
from crate_mae.evaluation.labels import comparable

# (training features, test features, names of the classes) to results
Probe = Callable[[Features, Features, list[str]], Sequence[Any]]
Extractor = Callable[[Backbone, ImageSource, Extraction], list[Features]]

_PACKAGES = ("crate-mae", "torch", "timm", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe found.

    Attributes:
        backbone: what was probed.
        train: name of the training images.
        val: name of the test images.
        images: numbers of training and test images.
        classes: names.
        pooling: how tokens became features.
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
        """Everything for a JSON file: what was measured on what, with which settings and versions."""
        return {
            "model": self.backbone.name,
            "fresh_weights": self.backbone.is_fresh,
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
        train: labelled images that the probe learns from.
        val: labelled images that it is measured on.
        run: the probe.
        extraction: how to extract features.
        seed: of fresh weights.
        extractor: `extract`, or a function that also shows how far it is.

    Raises:
        UserError: for a mistake in the model, data or labels.
    """
    sources = (open_source(train), open_source(val))
    _refuse_same(*sources)
    backbone = open_backbone(model, seed=seed)
    train_layers, val_layers = (extractor(backbone, source, extraction) for source in sources)
    rows: list[tuple[int, Any]] = []
    classes: list[str] = []
    for train_features, val_features in zip(train_layers, val_layers, strict=True):
        train_features, val_features, classes = comparable(train_features, val_features)
        rows += [(train_features.layer, result) for result in run(train_features, val_features, classes)]
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
    """How a report names data: by a name that opens it from any folder."""
    return full_name(data) if isinstance(data, (str, Path)) else source.name


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {package: version(package) for package in _PACKAGES}


def _refuse_same(train: ImageSource, val: ImageSource) -> None:
    if same_images(train, val):
        raise UserError(
            f"--train and --val are the same images ({train.name}), so a probe would be asked what it was told.\n"
            "Give test images that it has not seen with --val."
        )
