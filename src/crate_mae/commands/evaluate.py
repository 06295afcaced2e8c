"""`crate-mae eval knn | linear | fewshot`: evaluate frozen features with labelled images."""

from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from crate_mae.commands.console import (
    check_seed,
    new_file,
    print_bad,
    print_if_random,
    print_json,
    takes,
)
from crate_mae.commands.embed import FeatureOptions, extract_with_progress
from crate_mae.data.documents import to_json
from crate_mae.data.files import write_whole
from crate_mae.data.numbers import check_whole
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError
from crate_mae.models.config import NEIGHBOURS, HeadPooling
from crate_mae.options import JSON_HELP, Data, option
from crate_mae.terminal import CleanConsole, open_console

if TYPE_CHECKING:
    from crate_mae.evaluation.probing import Probe, Probed


@dataclass(frozen=True)
class Evaluation:
    """Result of a probe.

    Attributes:
        report: the content of `--out` and of `--json`. Of a probe: `probe`, `model`, `random_initialisation` (whether
            its weights are random), `train`, `val`, `train_images`, `val_images`, `left_out` (unreadable images and
            reasons), `classes`, `image_size`, `pooling`, `seed` and other settings, `results` (one per layer or number
            of shots; scores have `value`, `low` and `high`), `chance`, `controls`, `versions` and `verdict`. Of
            completions: `probe`, `model`, `random_initialisation`, `data`, `images`, `left_out`, `image_size`,
            `norm_pix_loss`, `seed`, `results` (one per mask ratio), `controls`, `versions` and `verdict`.
        path: of the file, or None.
    """

    report: dict[str, Any]
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(FeatureOptions):
    """The options that all probes share."""

    train: Data = option(MISSING, "Labelled images, in any form of data that `crate-mae pretrain` takes.")
    val: Data = option(MISSING, "Labelled images of the same classes to evaluate on.")
    out: Path | str | None = option(None, "New .json file for scores and settings.")
    pooling: HeadPooling | None = option(
        None, "The class token, the mean of patches, or both; by default cls+mean, or mean without a class token."
    )
    layer: int | Literal["all"] | None = option(
        None,
        "Layer of the encoder from 0, negative from the end, or all; by default, all if that takes minutes at most, "
        "otherwise -1.",
    )
    controls: bool = option(True, "Also probe the same architecture with random initialisation, and raw pixels.")
    seed: int = option(0, "Seed for random initialisation and for the probe's random choices.")
    json: bool = option(False, JSON_HELP)


@dataclass(frozen=True, kw_only=True)
class KnnOptions(ProbeOptions):
    """The options of `eval_knn`."""

    k: int = option(NEIGHBOURS, "Number of neighbours.")


@dataclass(frozen=True, kw_only=True)
class FewshotOptions(ProbeOptions):
    """The options of `eval_fewshot`."""

    shots: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = option(
        (1, 5, 10), "Numbers of images per class."
    )
    draws: int = option(20, "Number of draws.")
    layer: int | Literal["all"] | None = option(
        None,
        "Layer of the encoder from 0, negative from the end, or all; by default -1. With all, the last layer is "
        "compared with the controls, because there are too few labels to choose a layer on.",
    )


@takes(KnnOptions)
def eval_knn(options: KnnOptions) -> Evaluation:
    """Classify images by the nearest neighbours of their frozen features among labelled images.

    The k training images with the largest cosine similarity vote, each with the weight exp(similarity / 0.07). Features
    are standardised over the training images first. Nothing is trained. Scores have Wilson's 95% interval over the
    validation images. If there are several layers, the one that is compared with the controls is chosen on a tenth of
    the training images, never on the validation images.

    Returns:
        The scores, one row per layer.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.evaluation.probes import knn_accuracy_on_tenth, knn_probe

    check_whole("--k", options.k)

    def run(train: Any, val: Any, _classes: list[str]) -> list[Any]:
        result = knn_probe(train.values, train.labels, val.values, val.labels, k=options.k)
        if train.is_only_layer:  # there is none to choose
            return [result]
        chosen_on = knn_accuracy_on_tenth(train.values, train.labels, k=options.k, seed=options.seed)
        return [replace(result, chosen_on=chosen_on)]

    return _evaluate("knn", run, options, k=options.k)


@takes(ProbeOptions)
def eval_linear(options: ProbeOptions) -> Evaluation:
    """Fit a linear classifier to the frozen features of labelled images.

    The classifier is multinomial logistic regression on standardised features. Its regularisation C is chosen on a
    tenth of the training images, never on the validation images, and so is the layer that is compared with the
    controls: the best of many scores would be biased. Scores have Wilson's 95% interval over the validation images.

    Returns:
        The scores, one row per layer.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.evaluation.probes import linear_probe, refuse_small_classes

    def run(train: Any, val: Any, classes: list[str]) -> list[Any]:
        refuse_small_classes(train.labels, 2, classes)
        return [linear_probe(train.values, train.labels, val.values, val.labels, seed=options.seed)]

    return _evaluate("linear", run, options)


@takes(FewshotOptions)
def eval_fewshot(options: FewshotOptions) -> Evaluation:
    """Fit a linear classifier to the frozen features of a few images of each class, drawn many times.

    The classifier is logistic regression (C = 1) on features standardised over all training images, which needs no
    labels. The interval is Student's 95% interval of the mean over draws.

    Returns:
        The scores, one row per number of shots.

    Raises:
        UserError: for a mistake in the options, model, data or labels; no file is written then.
    """
    from crate_mae.evaluation.probes import fewshot_probe, refuse_small_classes

    shots, draws = options.shots, options.draws
    check_whole("--draws", draws)
    if not shots:
        raise UserError("--shots is empty: give at least one number of images.")
    for each in shots:
        check_whole("--shots", each)

    def run(train: Any, val: Any, classes: list[str]) -> list[Any]:
        refuse_small_classes(train.labels, max(shots), classes)
        arrays = (train.values, train.labels, val.values, val.labels)
        return [fewshot_probe(*arrays, shots=count, draws=draws, seed=options.seed) for count in shots]

    return _evaluate("fewshot", run, options, draws=draws)


def _evaluate(kind: str, run: "Probe", options: ProbeOptions, **settings: int) -> Evaluation:
    """Check the options, run a probe, print its table, and write its file."""
    from crate_mae.evaluation.extract import AFFORDABLE
    from crate_mae.evaluation.probing import probe
    from crate_mae.models.features import DEFAULT_LAYER

    check_seed(options.seed)
    out = None if options.out is None else new_file("--out", options.out, ".json", overwrite=options.overwrite)
    default = DEFAULT_LAYER if isinstance(options, FewshotOptions) else AFFORDABLE
    extraction = options.extraction(default if options.layer is None else options.layer, options.pooling)
    console = open_console(stderr=options.json)
    probed = probe(
        options.model,
        options.train,
        options.val,
        run,
        extraction=extraction,
        seed=options.seed,
        extractor=partial(extract_with_progress, console),
        with_controls=options.controls,
    )
    verdict = _verdict(probed) if probed.controls else None
    report = {"probe": kind, **probed.report(seed=options.seed, **settings), "verdict": verdict}
    console.print_text(
        f"{kind} probe of {report['model']}, {report['pooling']} features: {report['train_images']:,} training and "
        f"{report['val_images']:,} validation images of {len(report['classes'])} classes"
    )
    console.print(_table(probed))
    if verdict is not None:
        console.print_text(verdict)
    print_bad(console, probed.bad)
    if probed.hint:
        console.print_text(f"{probed.hint} Probes standardise them.")
    for layer, result in probed.rows:
        for warning in result.warnings():
            console.print_text(f"Layer {layer}: {warning}")
    print_if_random(console, probed.backbone.name, probed.backbone.is_random)
    write_report(console, report, out, json=options.json)
    return Evaluation(report, out)


def write_report(console: CleanConsole, report: dict[str, Any], out: Path | None, *, json: bool) -> None:
    """Write a report as JSON to a file if one is given, and to the standard output if that is asked for."""
    if out is not None:
        write_whole(out, to_json(report) + "\n")
        console.print_text(f"Saved {out}")
    if json:
        print_json(report)


def _table(probed: "Probed") -> Table:
    from crate_mae.evaluation.backbones import PIXELS
    from crate_mae.evaluation.probes import SCORE

    titles = list(probed.rows[0][1].cells())
    table = Table("features of", "layer", *titles, box=None)
    for each in (probed, *probed.controls):
        name = "random initialisation" if each.backbone.is_random else PIXELS if each is not probed else "the model"
        for layer, result in each.rows:
            cells = result.cells()
            table.add_row(name, str(layer), *(cells.get(title, "") for title in titles))
            name = ""
    if probed.controls:
        of_chance = (str(probed.chance) if title == SCORE else "" for title in titles)
        table.add_row("most frequent class", "", *of_chance)
    return table


def _verdict(probed: "Probed") -> str:
    """Whether training has helped: the chosen layers compared, by their intervals."""
    from crate_mae.evaluation.probes import FewshotResult

    layer, result = probed.chosen()
    score = result.score
    where = f"Layer {layer} of {probed.backbone.name} ({100 * score.value:.1f}%)"
    if result.chosen_on is not None and len(probed.rows) > 1:
        where += ", chosen on training images"
    if isinstance(result, FewshotResult):
        where += f" from {plural(result.shots, 'labelled image')} per class"
    comparisons = []
    for control in probed.controls:
        at, found = control.chosen()
        other, what = found.score, "random initialisation" if control.backbone.is_random else control.backbone.name
        if len(control.rows) > 1:
            what = f"layer {at} of {what}"
        overlap = score.low <= other.high and other.low <= score.high
        what += " on these images" if overlap else ""
        comparisons.append(compared_with(what, 100 * (score.value - other.value), ".1f", "points", overlap=overlap))
    return f"{where}: {'; '.join(comparisons)}."


def compared_with(control: str, difference: float, digits: str, unit: str, *, overlap: bool) -> str:
    """How much better or worse a score is than that of a control; no better if their intervals overlap."""
    if overlap:
        return f"no better than {control} ({difference:+{digits}} {unit}; the intervals overlap)"
    return f"{abs(difference):{digits}} {unit} {'better' if difference > 0 else 'WORSE'} than {control}"
