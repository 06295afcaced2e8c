"""Labels of training and test images that mean the same."""

import dataclasses

import numpy as np

from crate_mae.errors import UserError, and_more
from crate_mae.evaluation.extract import Features


def comparable(train: Features, test: Features) -> tuple[Features, Features, list[str]]:
    """The same features, with labels that are numbers of one list of classes; and that list.

    Classes are compared by name, or by number in text where they have no names. The test images need not show every
    class of the training images, but may show no other.

    Raises:
        UserError: if either has no labels, the test images show a class of their own, or there is one class only.
    """
    train_names, test_names = _names(train), _names(test)
    classes = list(dict.fromkeys(train_names.values()))
    strange = [name for name in test_names.values() if name not in classes]
    if strange:
        missing = [name for name in classes if name not in test_names.values()]
        raise UserError(
            f"{test.name} has classes that {train.name} lacks: {and_more(strange)}.\n"
            + (f"Only {train.name} has: {and_more(missing)}.\n" if missing else "")
            + "Training and validation images must be of the same classes, with the same names."
        )
    if len(classes) < 2:
        raise UserError(f"All images of {train.name} are of one class ({classes[0]}): there is nothing to tell apart.")
    return _renumbered(train, train_names, classes), _renumbered(test, test_names, classes), classes


def _names(features: Features) -> dict[int, str]:
    """The name of every label that occurs, in the order of labels."""
    if features.labels is None:
        raise UserError(
            f"{features.name} has no labels, which a probe needs.\n"
            "Labels are folders named after classes, a column `label` of a parquet file, or .cls files in a shard."
        )
    names = features.classes or []
    labels = [int(label) for label in np.unique(features.labels)]
    return {label: names[label] if label < len(names) else str(label) for label in labels}


def _renumbered(features: Features, names: dict[int, str], classes: list[str]) -> Features:
    assert features.labels is not None
    number = {label: classes.index(name) for label, name in names.items()}
    labels = np.array([number[int(label)] for label in features.labels], dtype=np.int64)
    return dataclasses.replace(features, labels=labels, classes=classes)
