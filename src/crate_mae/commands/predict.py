"""`crate-mae predict`: classify images with a model that `crate-mae finetune` trained."""

from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING

from crate_mae.commands.console import computes, new_file, print_bad, print_if_random
from crate_mae.data.documents import to_csv
from crate_mae.data.files import write_whole
from crate_mae.data.numbers import MOST_THREADS, check_whole
from crate_mae.data.results import BadImage
from crate_mae.options import Data, OutputPath
from crate_mae.terminal import open_console

if TYPE_CHECKING:
    from torch import Tensor

    from crate_mae.data import ImageSource
    from crate_mae.models.classifier import Classifier


@dataclass(frozen=True)
class Predictions:
    """Result of `predict`.

    Attributes:
        path: of the CSV file.
        files: where each image is, in the order of the data.
        predicted: the most probable class of each image.
        probability: of that class.
        accuracy: share of images whose class was predicted; None without labels of the model's classes.
        bad: the images that cannot be read, with reasons; they are left out.
    """

    path: Path
    files: list[str]
    predicted: list[str]
    probability: list[float]
    accuracy: float | None
    bad: list[BadImage]


@computes
def predict(
    model: Data,
    images: Data,
    *,
    out: OutputPath,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
) -> Predictions:
    """Predict the class of every image, and save the probabilities.

    The file has one row per image: its location, the predicted class, its probability, the true class if IMAGES has
    labels (`label`), and the probability of each class (`p_` and its name). Images that cannot be read are listed and
    left out. If the labels have the classes of the model, the accuracy is printed too.

    Args:
        model: A run of `crate-mae finetune`, a folder with its model.safetensors and config.json, or hf:user/name.
        images: An image, a folder of images, or any other form of data that `crate-mae pretrain` takes.
        out: New .csv file for the predictions.
        batch_size: Images per batch.
        workers: Number of processes that load images.
        overwrite: Replace an existing file.

    Returns:
        The predictions, and the accuracy if it is known.

    Raises:
        UserError: if the model is not a classifier, no image can be read, or `out` exists already.
    """
    from crate_mae.data import label_names, open_source
    from crate_mae.models.devices import fastest_device
    from crate_mae.models.weights import is_untrained, load_classifier, model_name

    out = new_file("--out", out, ".csv", overwrite=overwrite)
    check_whole("--batch-size", batch_size)
    check_whole("--workers", workers, 0, MOST_THREADS)
    source = open_source(images)
    net = load_classifier(model)
    if net is not model:  # a model from Python stays where it is
        net.to(fastest_device())
    probabilities, indices, bad = _classify(net, source, batch_size, workers)
    classes = net.config.classes
    best = probabilities.max(dim=1)
    predicted = [classes[number] for number in best.indices.tolist()]
    files = [source.location(i) for i in indices]
    columns = {"file": files, "prediction": predicted, "probability": _digits(best.values)}
    names = label_names(source)
    truth = None if names is None else [names[i] for i in indices]
    if truth is not None:
        columns["label"] = truth
    columns |= {f"p_{name}": _digits(values) for name, values in zip(classes, probabilities.T, strict=True)}
    write_whole(out, to_csv(list(columns), zip(*columns.values(), strict=True)))

    console, accuracy = open_console(), None
    print_bad(console, bad)
    if truth is not None and set(truth) <= set(classes):
        accuracy = sum(map(eq, predicted, truth)) / len(predicted)
        console.print_text(f"Accuracy: {accuracy:.2%} of {len(files):,} images")
    elif truth is not None:
        console.print_text(f"{source.name} has labels of other classes than the model: no accuracy.")
    print_if_random(console, model_name(model), is_untrained(model_name(model)))
    console.print_text(f"Saved {len(files):,} predictions in {out}")
    return Predictions(out, files, predicted, best.values.tolist(), accuracy, bad)


def _digits(values: "Tensor") -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]


def _classify(
    model: "Classifier", source: "ImageSource", batch_size: int, workers: int
) -> "tuple[Tensor, list[int], list[BadImage]]":
    """Return probabilities (one row per image), the numbers of the images, and the images that cannot be read."""
    import torch

    from crate_mae.data import readable_batches
    from crate_mae.data.base import none_readable
    from crate_mae.models.features import evaluating, transform_of

    place = model.head.weight
    rows, indices, bad = [], [], []
    with evaluating(model):
        for batch in readable_batches(source, transform_of(model.config), batch_size, workers=workers):
            bad += batch.bad
            if len(batch.images):
                rows.append(model(batch.images.to(place.device, place.dtype)).float().softmax(dim=1).cpu())
                indices += batch.indices.tolist()
    if not rows:
        raise none_readable(f"No image of {source.name}", bad[0])
    return torch.cat(rows), indices, bad
