"""Everything that a report is made of."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from crate_mae.data.facts import fixed_sample
from crate_mae.errors import UserError
from crate_mae.evaluation.probing import versions
from crate_mae.evaluation.reconstruction import nested_masks, read_images
from crate_mae.interpret.attention_use import AttentionUse, attention_use
from crate_mae.interpret.audit import AuditRow
from crate_mae.interpret.foregrounds import Drawings, read_drawings, read_drawn, score_foregrounds
from crate_mae.interpret.measure import LayerMeasures, Progress, measure_layers
from crate_mae.interpret.report.description import describe, tokens_of
from crate_mae.interpret.report.examples import DEFAULT_MASK_RATIO, Examples, collect_examples, grid_size
from crate_mae.interpret.report.probes import (
    ProbeImages,
    last_layer_score,
    probe_images,
    probe_rows,
    split_probe_images,
)
from crate_mae.interpret.report.settings import Settings
from crate_mae.interpret.report.subjects import LABELS, NETWORKS, UNTRAINED, Subject, open_subjects
from crate_mae.interpret.statistics import Row, find
from crate_mae.models.autoencoder import MaskedAutoencoder

_DRAWS = 5  # of untrained networks, for the audit


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One network on one source of images.

    Attributes:
        key: one of `subjects.LABELS`.
        is_fresh: whether nobody has trained the network.
        tokens: image size, patches and width in a few words.
        measures: all curves, those of probes among them.
    """

    key: str
    is_fresh: bool
    tokens: str
    measures: LayerMeasures

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return LABELS[self.key]

    @property
    def has_own_network(self) -> bool:
        """Whether it stands for a network, and not for the model on other images."""
        return self.key in NETWORKS

    def find(self, measure: str, point: str = "", part: str = "encoder") -> list[Row]:
        """The curve of one measure over the layers of a part."""
        return find(self.measures.rows, measure, point, part)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of a model's training.

    Attributes:
        lines: of a table, by their names.
        mask_ratio: share of patches that was hidden; None if nobody can tell.
    """

    lines: dict[str, str] = field(default_factory=dict)
    mask_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found, with all that it depends on.

    Attributes:
        settings: what was asked for.
        description: what the model is, line by line.
        training: how it was trained, likewise; empty if nobody can tell.
        measured: the model first, then its controls.
        attention_use: what the model loses when its attention mixes no tokens; empty if it has no such attention.
        examples: what is looked at.
        left_out: what the report as a whole does not have, and why.
        notes: sentences on numbers that are less than they seem.
        versions: of what computed the numbers.
    """

    settings: Settings
    description: dict[str, str]
    training: dict[str, str]
    measured: list[Measured]
    attention_use: list[AttentionUse]
    examples: Examples
    left_out: dict[str, str]
    notes: list[str]
    versions: dict[str, str]

    @property
    def model(self) -> Measured:
        """The model on the images."""
        return self.measured[0]

    def subject(self, key: str) -> Measured | None:
        """The subject of this key, if there is one."""
        return next((found for found in self.measured if found.key == key), None)

    def to_json(self) -> str:
        """All numbers, as JSON."""
        content = {
            "settings": self.settings.named(),
            "model": self.description,
            "training": self.training,
            "subjects": [
                {
                    "subject": found.key,
                    "label": found.label,
                    "fresh_weights": found.is_fresh,
                    "tokens": found.tokens,
                    **asdict(found.measures),
                }
                for found in self.measured
            ],
            "attention_use": [asdict(found) for found in self.attention_use],
            "completions": _completions(self.examples),
            "left_out": self.left_out,
            "notes": self.notes,
            "versions": self.versions,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Every measure of every layer and subject, one a line."""
        return _csv(Row, {m.key: m.measures.rows for m in self.measured})

    def audit_csv(self) -> str:
        """Every claim about every layer and subject, one a line."""
        return _csv(AuditRow, {m.key: m.measures.audit for m in self.measured})

    def attention_csv(self) -> str:
        """The model without mixing in some of its layers, one choice of layers a line."""
        return _csv(AttentionUse, {self.model.key: self.attention_use})


def inspect_model(
    settings: Settings, *, training: Training | None = None, on_stage: Progress | None = None
) -> Inspection:
    """Measure a model and its controls, and look at a few images.

    Args:
        settings: what to measure on what.
        training: what is known of the model's training.
        on_stage: told what is done next.

    Raises:
        UserError: for a mistake in the models or the data, or weights that are not finite.
    """
    say, known = on_stage or (lambda _stage: None), training or Training()
    subjects, left_out = open_subjects(settings)
    drawings = None if settings.foregrounds is None else read_drawings(Path(settings.foregrounds))
    if drawings is None:
        left_out["scores of foregrounds"] = "no masks or boxes were given with --foregrounds"
    images, why_not = _probe_images(subjects, settings)
    if images is None:
        left_out["linear probes"] = why_not
    notes: list[str] = []
    measured = []
    hidden = settings.mask_ratio or known.mask_ratio or DEFAULT_MASK_RATIO
    for subject in subjects.values():
        say(f"{subject.label}: {subject.opened.name} on {subject.source.name}")
        scores = _foreground_rows(subject, settings, drawings)
        measured.append(_measure(subject, settings, hidden, images, notes, say, scores))
    say("the model without mixing")
    use = _attention_use(subjects["model"], settings, hidden, images, left_out)
    say("pictures")
    examples = collect_examples(subjects, count=settings.count, mask_ratio=hidden, seed=settings.seed)
    notes += _shortages(subjects, measured, settings)
    return Inspection(
        settings=settings,
        description=describe(subjects["model"].opened),
        training=known.lines,
        measured=measured,
        attention_use=use,
        examples=examples,
        left_out=left_out | examples.left_out,
        notes=notes,
        versions={"python": platform.python_version(), **versions()},
    )


def _measure(
    subject: Subject,
    settings: Settings,
    hidden: float,
    images: ProbeImages | None,
    notes: list[str],
    say: Progress,
    scores: list[Row],
) -> Measured:
    measures = measure_layers(
        subject.opened,
        subject.source,
        count=settings.count,
        mask_ratio=settings.mask_ratio,
        seed=settings.seed,
        audited=subject.key not in UNTRAINED,
        untrained=_DRAWS if subject.key in NETWORKS else 0,
        training_mask_ratio=hidden,
        on_stage=lambda stage: say(f"{subject.label}: {stage}"),
    )
    measures = dataclasses.replace(measures, rows=[*measures.rows, *scores])
    if images is not None and subject.has_own_network:
        say(f"{subject.label}: linear probes")
        rows, converged = probe_rows(subject.opened.backbone, images)
        measures = dataclasses.replace(measures, rows=[*measures.rows, *rows])
        if not converged:
            notes.append(f"Linear probes of {subject.label} did not all converge: they may know more than is shown.")
    return Measured(
        key=subject.key,
        is_fresh=subject.opened.backbone.is_fresh,
        tokens=tokens_of(subject.opened),
        measures=measures,
    )


def _attention_use(
    model: Subject, settings: Settings, hidden: float, images: ProbeImages | None, left_out: dict[str, str]
) -> list[AttentionUse]:
    """The model without mixing, judged by its loss and, where there are labels, a probe."""
    net, source = model.opened.net, model.source
    if not isinstance(net, MaskedAutoencoder):
        left_out["masked loss without mixing"] = "the model has no decoder"
        return []
    backbone = model.opened.backbone
    if images is None and settings.probe_images:
        try:
            images = split_probe_images(source, settings.probe_images, settings.seed)
        except UserError as error:
            left_out["linear probe without mixing"] = str(error)
    chosen = fixed_sample(len(source), settings.count, settings.seed)
    shown = read_images(source, backbone.transform(), chosen, settings.count).images
    masks = nested_masks(len(shown), net.num_patches, hidden, settings.seed)
    probe = None if images is None else partial(last_layer_score, backbone, images)
    found = attention_use(net, shown, masks, probe=probe)
    if not found:
        left_out["masked loss without mixing"] = "no layer has attention in subspaces"
    return found


def _foreground_rows(subject: Subject, settings: Settings, drawings: Drawings | None) -> list[Row]:
    """How well a network finds what was drawn on the images."""
    encoder = subject.opened.backbone.encoder
    if drawings is None or not subject.has_own_network or grid_size(encoder) is None:
        return []
    chosen = fixed_sample(len(subject.source), settings.count, settings.seed)
    drawn = read_drawn(drawings, subject.source, chosen, subject.opened.backbone)
    return score_foregrounds(encoder, drawn)


def _probe_images(subjects: dict[str, Subject], settings: Settings) -> tuple[ProbeImages | None, str]:
    """The images of the probes, or why there are none."""
    if not settings.probe_images:
        return None, "--probe-images is 0"
    if "train" not in subjects:
        return None, "they need labelled training images, given with --train-data"
    try:
        train, test = subjects["train"].source, subjects["model"].source
        return probe_images(train, test, settings.probe_images, settings.seed), ""
    except UserError as error:
        return None, str(error)


def _shortages(subjects: dict[str, Subject], measured: Sequence[Measured], settings: Settings) -> list[str]:
    """Sentences on sources that had fewer images than were asked for."""
    notes = []
    for found in measured:
        if found.measures.images < settings.count and found.key not in NETWORKS[1:]:
            bad = f", {len(found.measures.bad)} of which cannot be read" if found.measures.bad else ""
            held = len(subjects[found.key].source)
            notes.append(
                f"{found.measures.data} holds {held} images{bad}: {found.measures.images} were measured where "
                f"{settings.count} were asked for."
            )
    if measured[0].measures.images == 1:
        notes.append("One image has no spread: nothing here has an interval, and no claim can be judged.")
    return notes


def _completions(examples: Examples) -> dict[str, Any] | None:
    """PSNR of each completion that is shown, which has none if it is perfect."""
    found = examples.completed
    if found is None:
        return None
    psnr = [value if math.isfinite(value) else None for value in found.psnr]
    return {"mask_ratio": found.mask_ratio, "psnr": psnr}


def _csv(kind: type, rows: Mapping[str, Sequence[Any]]) -> str:
    """Rows of several subjects as one table, whose first column names the subject."""
    text = io.StringIO()
    names = [column.name for column in fields(kind)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject", *names])
    for subject, found in rows.items():
        writer.writerows([subject, *(getattr(row, name) for name in names)] for row in found)
    return text.getvalue()
