"""Training and validation images with labels that mean the same in both."""

from __future__ import annotations

from typing import Any

import numpy as np

from crate_mae.data import NO_LABEL, ImageSource, Part, label_names, occurring_classes, same_images
from crate_mae.errors import UserError, and_more
from crate_mae.training.images import RunImages, open_named
from crate_mae.training.randomness import Purpose, derive_seed

_SHOWN = 5


def open_labelled(train: Any, val: Any, share: float, seed: int) -> RunImages:
    """Open training and validation images, and number their classes alike.

    Args:
        train: any form of DATA.
        val: any other.
        share: of the training images of each class, chosen by the seed.
        seed: of the run.

    Raises:
        UserError: without labels, with one class only, with other classes in one than in the other, or if the share
            leaves a class without an image.
    """
    (train_images, train_name), (val_images, val_name) = open_named(train), open_named(val)
    if same_images(train_images, val_images):
        raise UserError(
            f"--train and --val are the same images ({train_images.name}): the best model would be the one that knows "
            "them by heart.\nGive images that are not trained on with --val."
        )
    classes = _classes_of(train_images, "--train")
    if len(classes) < 2:
        raise UserError(f"All images of {train_images.name} are of one class, {classes[0]}: there is nothing to learn.")
    _refuse_differences(train_images, classes, val_images, _classes_of(val_images, "--val"))
    numbered = _numbered(train_images, classes)
    chosen = np.arange(len(numbered)) if share == 1 else stratified_share(numbered, classes, share, seed)
    val_numbered = _numbered(val_images, classes)
    return RunImages(
        Part(train_images, chosen, labels=numbered[chosen], classes=classes),
        Part(val_images, np.arange(len(val_numbered)), labels=val_numbered, classes=classes),
        train_name,
        val_name,
    )


def stratified_share(labels: np.ndarray, classes: list[str], share: float, seed: int) -> np.ndarray:
    """Choose round(share n) of the n images of each class: a function of the seed, and in the order of the images.

    A larger share of the same seed holds all images of a smaller one.

    Raises:
        UserError: if a class is left without an image.
    """
    draw = np.random.default_rng(derive_seed(seed, Purpose.LABELS))
    chosen, empty = [], []
    for number, name in enumerate(classes):
        members = draw.permutation(np.flatnonzero(labels == number))
        wanted = round(share * len(members))
        chosen.append(members[:wanted])
        if not wanted:
            empty.append(f"{name} ({len(members)})")
    if empty:
        raise UserError(
            f"--labels {share:g} leaves no image of {and_more(empty, _SHOWN)}: in brackets, how many images there are."
            "\nGive a larger share."
        )
    return np.sort(np.concatenate(chosen))


def _classes_of(source: ImageSource, option: str) -> list[str]:
    classes = occurring_classes(source)
    if not classes:
        raise UserError(
            f"{source.name} ({option}) has no labels, which fine-tuning learns.\n"
            "Labels are class folders, a label column in .parquet, .cls files in .tar shards, or (image, label) pairs."
        )
    return classes


def _refuse_differences(train: ImageSource, classes: list[str], val: ImageSource, val_classes: list[str]) -> None:
    """Raise a `UserError` if a class occurs in one source only."""
    differences = {
        train.name: [name for name in classes if name not in val_classes],
        val.name: [name for name in val_classes if name not in classes],
    }
    if found := [f"only in {source}: {and_more(names, _SHOWN)}" for source, names in differences.items() if names]:
        raise UserError(
            "Training and validation images have different classes,\n"
            + "; ".join(found)
            + ".\nBoth need the same ones, by name (or by number, where they have no names)."
        )


def _numbered(source: ImageSource, classes: list[str]) -> np.ndarray:
    number: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    # Only an image that could not be read is without a label by now; it is met, and told, again in training.
    return np.array([number.get(name, NO_LABEL) for name in label_names(source) or []], dtype=np.int64)
