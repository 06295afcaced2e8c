"""`crate-mae eval knn | linear | fewshot`: evaluate frozen features with labelled images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crate_mae.commands.console import (
    check_seed,
    extract_with_progress,
    new_file,
    print_bad,
    print_random_initialisation,
)
from crate_mae.training.options import Data

if TYPE_CHECKING:
    from crate_mae.evaluation.probes import Score
    from crate_mae.evaluation.probing import Probe

Pooled = Literal["cls", "mean", "cls+mean"]
Shots = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())]


@dataclass(frozen=True)
class Evaluation:
    """Result of a probe.

    Attributes:
        report: the content of `--out`: scores with intervals, and the images that they were measured on.
        path: of the file, or None.
    """

    report: dict[str, Any]
    path: Path | None


def eval_knn(
    model: Data,
    *,
    train: Data,
    val: Data,
    out: Path | str | None = None,
    k: int = 20,
    pooling: Pooled | None = None,
    layer: int | Literal["all"] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    max_bad: float = 0.01,
    cache: bool = True,
    overwrite: bool = False,
) -> Evaluation:
    """Classify images by the nearest neighbours of their frozen features among labelled images.

    The k training images with the largest cosine similarity vote, each with the weight exp(similarity / 0.07). Features
    are standardised over the training images first. Nothing is trained. Scores have Wilson's 95% interval over the
    validation images.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, the name of a model (random
            initialisation), timm:NAME, timm:NAME:random, or pixels.
        train: Labelled images, in any form of data that `crate-mae pretrain` takes.
        val: Labelled images of the same classes to measure on.
        out: New .json file for scores and settings.
        k: Number of neighbours.
        pooling: The class token, the mean of patches, or both; by default cls+mean, or mean without a class token.
        layer: Layer of the encoder from 0, negative from the end, or all; by default -1.
        seed: Seed of random initialisation.
        batch_size: Images per batch.
        workers: Processes that load images; by default one less than the number of cores, at most 8.
        max_bad: Largest share of unreadable images.
        cache: Keep features in the user's cache folder, and reuse them if nothing has changed.
        overwrite: Replace an existing file.

    Returns:
        The scores, one row per layer.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.evaluation.probes import knn_probe

    def run(train: Any, val: Any, _classes: list[str]) -> list[Any]:
        return [knn_probe(train.values, train.labels, val.values, val.labels, k=k)]

    return _evaluate("knn", run, locals(), shown=("top1", "top5"), settings={"k": k})


def eval_linear(
    model: Data,
    *,
    train: Data,
    val: Data,
    out: Path | str | None = None,
    pooling: Pooled | None = None,
    layer: int | Literal["all"] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    max_bad: float = 0.01,
    cache: bool = True,
    overwrite: bool = False,
) -> Evaluation:
    """Fit a linear classifier to the frozen features of labelled images.

    The classifier is multinomial logistic regression on standardised features. Its regularisation C is chosen on a
    tenth of the training images, never on the validation images. Scores have Wilson's 95% interval over the validation
    images. With --layer all, choose a layer by `chosen_on`, the accuracy on that tenth: the best of many scores is
    biased.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, the name of a model (random
            initialisation), timm:NAME, timm:NAME:random, or pixels.
        train: Labelled images, in any form of data that `crate-mae pretrain` takes.
        val: Labelled images of the same classes to measure on.
        out: New .json file for scores and settings.
        pooling: The class token, the mean of patches, or both; by default cls+mean, or mean without a class token.
        layer: Layer of the encoder from 0, negative from the end, or all; by default -1.
        seed: Seed of random initialisation, and of the choice of the tenth.
        batch_size: Images per batch.
        workers: Processes that load images; by default one less than the number of cores, at most 8.
        max_bad: Largest share of unreadable images.
        cache: Keep features in the user's cache folder, and reuse them if nothing has changed.
        overwrite: Replace an existing file.

    Returns:
        The scores, one row per layer.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.evaluation.probes import linear_probe, refuse_small_classes

    def run(train: Any, val: Any, classes: list[str]) -> list[Any]:
        refuse_small_classes(train.labels, 2, classes)
        return [linear_probe(train.values, train.labels, val.values, val.labels, seed=seed)]

    return _evaluate("linear", run, locals(), shown=("top1", "top5", "chosen_on", "c"), settings={})


def eval_fewshot(
    model: Data,
    *,
    train: Data,
    val: Data,
    out: Path | str | None = None,
    shots: Shots = (1, 5, 10),
    draws: int = 20,
    pooling: Pooled | None = None,
    layer: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    max_bad: float = 0.01,
    cache: bool = True,
    overwrite: bool = False,
) -> Evaluation:
    """Fit a linear classifier to the frozen features of a few images of each class, drawn many times.

    The classifier is logistic regression (C = 1) on features standardised over all training images, which needs no
    labels. The interval is Student's 95% interval of the mean over draws.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, the name of a model (random
            initialisation), timm:NAME, timm:NAME:random, or pixels.
        train: Labelled images to draw from, in any form of data that `crate-mae pretrain` takes.
        val: Labelled images of the same classes to measure on.
        out: New .json file for scores and settings.
        shots: Numbers of images per class.
        draws: Number of draws.
        pooling: The class token, the mean of patches, or both; by default cls+mean, or mean without a class token.
        layer: Layer of the encoder from 0, or negative from the end; by default -1.
        seed: Seed of random initialisation, and of the draws.
        batch_size: Images per batch.
        workers: Processes that load images; by default one less than the number of cores, at most 8.
        max_bad: Largest share of unreadable images.
        cache: Keep features in the user's cache folder, and reuse them if nothing has changed.
        overwrite: Replace an existing file.

    Returns:
        The scores, one row per number of shots.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.errors import UserError
    from crate_mae.evaluation.probes import fewshot_probe, refuse_small_classes

    if draws < 1 or not shots or min(shots) < 1:
        raise UserError(f"--draws is {draws} and --shots {shots}, but all must be at least 1.")

    def run(train: Any, val: Any, classes: list[str]) -> list[Any]:
        refuse_small_classes(train.labels, max(shots), classes)
        arrays = (train.values, train.labels, val.values, val.labels)
        return [fewshot_probe(*arrays, shots=count, draws=draws, seed=seed) for count in shots]

    return _evaluate("fewshot", run, locals(), shown=("shots", "accuracy"), settings={"draws": draws})


def _evaluate(
    kind: str, run: "Probe", options: dict[str, Any], *, shown: tuple[str, ...], settings: dict[str, Any]
) -> Evaluation:
    """Check the options, run a probe, print its table, and write its file."""
    from crate_mae.evaluation.extract import Extraction
    from crate_mae.evaluation.probing import probe
    from crate_mae.models.features import DEFAULT_LAYER
    from crate_mae.terminal import open_console

    check_seed(options["seed"])
    out = options["out"]
    out = None if out is None else new_file("--out", out, ".json", overwrite=options["overwrite"])
    layer = DEFAULT_LAYER if options["layer"] is None else options["layer"]
    extraction = Extraction(
        layers=layer if isinstance(layer, str) else (layer,),
        **{key: options[key] for key in ("pooling", "batch_size", "workers", "max_bad", "cache")},
    )
    console = open_console()
    probed = probe(
        options["model"],
        options["train"],
        options["val"],
        run,
        extraction=extraction,
        seed=options["seed"],
        extractor=partial(extract_with_progress, console),
    )
    report = {"probe": kind, **probed.report(seed=options["seed"], **settings)}
    console.print(_title(report), soft_wrap=True, markup=False)
    console.print(_table(probed.rows, shown))
    print_bad(console, probed.bad)
    for note in _notes(probed.rows):
        console.print(note, soft_wrap=True, markup=False)
    if probed.backbone.is_random:
        print_random_initialisation(console, probed.backbone.name)
    write_report(console, report, out)
    return Evaluation(report, out)


def write_report(console: Any, report: dict[str, Any], out: Path | None) -> None:
    """Write a report as JSON if a file is given."""
    from crate_mae.data.documents import to_json
    from crate_mae.data.files import write_whole

    if out is not None:
        write_whole(out, (to_json(report) + "\n").encode())
        console.print(f"Saved {out}", soft_wrap=True, markup=False)


def _title(report: dict[str, Any]) -> str:
    return (
        f"{report['probe']} probe of {report['model']}, {report['pooling']} features: {report['train_images']:,} "
        f"training and {report['val_images']:,} validation images of {len(report['classes'])} classes"
    )


def _table(rows: list[tuple[int, Any]], shown: tuple[str, ...]) -> Any:
    from rich.table import Table

    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "top1": ("top-1 (95%)", lambda result: _percent(result.top1)),
        "top5": ("top-5 (95%)", lambda result: _percent(result.top5)),
        "chosen_on": ("chosen on", lambda result: f"{100 * result.chosen_on:.2f}%"),
        "c": ("C", lambda result: f"{result.c:.2g}"),
        "shots": ("images a class", lambda result: str(result.shots)),
        "accuracy": ("top-1 (95%)", lambda result: _percent(result.accuracy)),
    }
    kept = [columns[name] for name in shown if getattr(rows[0][1], name) is not None]
    table = Table("layer", *(title for title, _ in kept), box=None)
    for layer, result in rows:
        table.add_row(str(layer), *(cell(result) for _, cell in kept))
    return table


def _percent(score: "Score") -> str:
    return f"{100 * score.value:.2f}% ({100 * score.low:.2f} to {100 * score.high:.2f})"


def _notes(rows: list[tuple[int, Any]]) -> list[str]:
    """Warn about scores that may not be the best possible."""
    notes = []
    for layer, result in rows:
        if getattr(result, "is_c_at_edge", False):
            notes.append(
                f"Layer {layer}: the best C ({result.c:.2g}) is at the edge of the grid; a better one may be beyond."
            )
        if not getattr(result, "converged", True):
            notes.append(f"Layer {layer}: the solver stopped before it converged, so a better fit may exist.")
    return notes
