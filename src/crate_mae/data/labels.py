"""Classes by name: what makes the labels of two sources comparable."""

import numpy as np

from crate_mae.data.base import ImageSource


def label_names(source: ImageSource) -> list[str | None] | None:
    """The class of every image: its name, or its number as text; None where it is unknown, and without labels.

    A number stands for one class in one source and may stand for another elsewhere, so sources are compared by names.
    """
    labels = source.labels
    if labels is None:
        return None
    return [None if label < 0 else _name(source, int(label)) for label in labels]


def occurring_classes(source: ImageSource) -> list[str]:
    """Names of the classes that have an image, in the order of their numbers; empty without labels."""
    labels = source.labels
    return [] if labels is None else [_name(source, int(label)) for label in np.unique(labels) if label >= 0]


def _name(source: ImageSource, label: int) -> str:
    return source.classes[label] if source.classes is not None and label < len(source.classes) else str(label)
