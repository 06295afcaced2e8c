"""Everything that a report is made of: the settings, the model, all measures, and what could not be measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from crate_mae.data import ImageSource
from crate_mae.data.base import fixed_sample
from crate_mae.data.documents import to_csv
from crate_mae.data.sources import full_name
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError, and_more
from crate_mae.evaluation.probing import versions
from crate_mae.evaluation.reconstruction import nested_masks, read_sample
from crate_mae.interpret.atoms import Atom, Gallery, measure_atoms
from crate_mae.interpret.audit import UNTRAINED_DRAWS, AuditRow
from crate_mae.interpret.foregrounds import Annotations, annotated_images, read_annotations, score_foregrounds
from crate_mae.interpret.information import (
    ProbeImages,
    last_layer_score,
    probe_images,
    probe_rows,
    split_probe_images,
)
from crate_mae.interpret.measure import Measurements, Opened, Progress, measure_layers
from crate_mae.interpret.removals import AttentionUse, Removal, attention_use, fitted_probe, mattering, removals
from crate_mae.interpret.report.examples import Examples, collect_examples
from crate_mae.interpret.report.options import InspectOptions
from crate_mae.interpret.report.subjects import (
    LABELS,
    NETWORKS,
    UNTRAINED,
    Subjects,
    describe,
    open_subjects,
    tokens_of,
)
from crate_mae.interpret.statistics import Row, find
from crate_mae.interpret.tokens import grid_size
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import MASK_RATIO
from crate_mae.models.tracing import layers_of


@dataclass(frozen=True)
class SubjectMeasures:
    """What was measured of one subject.

    Attributes:
        key: one of `subjects.LABELS`.
        is_random: whether the network has random initialisation.
        tokens: image size, patches and width in a few words.
        measures: all curves, probes included.
    """

    key: str
    is_random: bool
    tokens: str
    measures: Measurements

    @property
    def label(self) -> str:
        """Its name in figures and tables."""
        return LABELS[self.key]

    def find(self, measure: str, point: str = "", part: str = "encoder") -> list[Row]:
        """The curve of one measure over the layers of a part."""
        return find(self.measures.rows, measure, point, part)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of a model's training.

    Attributes:
        lines: of a table, by their names.
        mask_ratio: share of patches that was hidden; None if it is not known.
        data: name of the training images; empty if it is not known.
    """

    lines: dict[str, str] = field(default_factory=dict)
    mask_ratio: float | None = None
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was measured, with all that it depends on.

    Attributes:
        settings: what was asked for.
        description: what the model is, line by line.
        training: how it was trained, likewise; empty if that is not known.
        measured: the model first, then its controls.
        attention_use: what the model loses when its attention mixes no tokens; empty if it has no such attention.
        removals: what it loses without single heads and atoms; empty if that was not asked for.
        atoms: some of the encoder's last layer; None for a model without a decoder or without codes.
        examples: what is drawn.
        left_out: what the report as a whole does not have, and why.
        notes: sentences on numbers that need caution.
        versions: of the packages that computed the numbers.
    """

    settings: InspectOptions
    description: dict[str, str]
    training: dict[str, str]
    measured: list[SubjectMeasures]
    attention_use: list[AttentionUse]
    removals: list[Removal]
    atoms: Gallery | None
    examples: Examples
    left_out: dict[str, str]
    notes: list[str]
    versions: dict[str, str]

    @property
    def model(self) -> SubjectMeasures:
        """The model on the images."""
        return self.measured[0]

    def to_json(self) -> str:
        """All numbers, as JSON."""
        examples = self.examples
        content = {
            "settings": self.settings.named(),
            "model": self.description,
            "training": self.training,
            "subjects": [
                {
                    "subject": found.key,
                    "label": found.label,
                    "random_initialisation": found.is_random,
                    "tokens": found.tokens,
                    **asdict(found.measures),
                }
                for found in self.measured
            ],
            "attention_use": [asdict(found) for found in self.attention_use],
            "interventions": [asdict(found) for found in self.removals],
            "atoms": [] if self.atoms is None else [asdict(atom) for atom in self.atoms.atoms],
            "completions": {"mask_ratio": examples.mask_ratio, "psnr": examples.psnr} if examples.psnr else None,
            "left_out": self.left_out,
            "notes": self.notes,
            "versions": self.versions,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def tables(self) -> dict[str, str]:
        """The CSV files: measures and claims of every layer and subject, and the model without mixing in layers."""
        tables = {
            "measures.csv": _csv(Row, {m.key: m.measures.rows for m in self.measured}),
            "audit.csv": _csv(AuditRow, {m.key: m.measures.audit for m in self.measured}),
            "attention.csv": _csv(AttentionUse, {self.model.key: self.attention_use}),
        }
        if self.removals:
            tables["interventions.csv"] = _csv(Removal, {self.model.key: self.removals})
        if self.atoms is not None:
            tables["atoms.csv"] = _csv(Atom, {self.model.key: self.atoms.atoms})
        return tables


def inspect_model(
    settings: InspectOptions, *, training: Training | None = None, on_stage: Progress = lambda _stage: None
) -> Inspection:
    """Measure a model and its controls, and collect a few images.

    Args:
        settings: what to measure on what.
        training: what is known of the model's training.
        on_stage: called with the name of each stage.

    Raises:
        UserError: for a mistake in the models or the data, or weights that are not finite.
    """
    known = training or Training()
    subjects, left_out = open_subjects(settings)
    hidden = settings.mask_ratio or known.mask_ratio or MASK_RATIO
    inspector = _Inspector(settings, subjects, hidden, on_stage, left_out)
    annotations = None if settings.foregrounds is None else read_annotations(Path(settings.foregrounds))
    if annotations is None:
        left_out["scores of foregrounds"] = "no masks or boxes were given with --foregrounds"
    images = inspector.probe_images()
    measured = [inspector.measure(key, annotations, images) for key in subjects]
    on_stage("the model without mixing")
    model, source = subjects["model"]
    pixels = read_sample(source, model.backbone.transform(), settings.count, settings.seed).images
    use, removed = inspector.without_parts(pixels, images)
    on_stage("atoms")
    atoms = inspector.atoms(pixels, removed)
    on_stage("pictures")
    examples = collect_examples(subjects, count=settings.count, mask_ratio=hidden, seed=settings.seed)
    return Inspection(
        settings=settings,
        description=describe(model),
        training=known.lines,
        measured=measured,
        attention_use=use,
        removals=removed,
        atoms=atoms,
        examples=examples,
        left_out=left_out | examples.left_out,
        notes=[*inspector.notes, *_training_images(known, settings), *_shortages(subjects, measured, settings)],
        versions={"python": platform.python_version(), **versions()},
    )


@dataclass(frozen=True)
class _Inspector:
    """The measurements of a report one by one, with what all of them need and add to.

    Attributes:
        settings: what to measure on what.
        subjects: the model and its controls.
        hidden: share of patches that is hidden wherever something has to be.
        report: called with the name of each stage.
        left_out: what could not be measured, and why.
        notes: sentences on numbers that need caution.
    """

    settings: InspectOptions
    subjects: Subjects
    hidden: float
    report: Progress
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def probe_images(self) -> ProbeImages | None:
        """The images of the probes, if there are any."""
        if not self.settings.probe_images:
            self.left_out["linear probes"] = "--probe-images is 0"
        elif "train" not in self.subjects:
            self.left_out["linear probes"] = "they need labelled training images, given with --train-data"
        else:
            try:
                (_, train), (_, val) = self.subjects["train"], self.subjects["model"]
                return probe_images(train, val, self.settings.probe_images, self.settings.seed)
            except UserError as error:
                self.left_out["linear probes"] = str(error)
        return None

    def measure(self, key: str, annotations: Annotations | None, images: ProbeImages | None) -> SubjectMeasures:
        """All layers of a subject; of a network also its foregrounds and probes."""
        (opened, source), label = self.subjects[key], LABELS[key]
        self.report(f"{label}: {opened.name} on {source.name}")
        more = self._foreground_rows(opened, source, annotations) if key in NETWORKS else []
        measures = measure_layers(
            opened,
            source,
            count=self.settings.count,
            mask_ratio=self.settings.mask_ratio,
            seed=self.settings.seed,
            audited=key not in UNTRAINED,
            untrained=UNTRAINED_DRAWS if key in NETWORKS else 0,
            training_mask_ratio=self.hidden,
            on_stage=lambda stage: self.report(f"{label}: {stage}"),
        )
        if images is not None and key in NETWORKS:
            self.report(f"{label}: linear probes")
            probes, converged = probe_rows(opened.backbone, images)
            more += probes
            if not converged:
                note = f"Linear probes of {label} did not all converge: their accuracy may be higher than reported."
                self.notes.append(note)
        measures = replace(measures, rows=[*measures.rows, *more])
        return SubjectMeasures(key, opened.backbone.is_random, tokens_of(opened), measures)

    def _foreground_rows(self, network: Opened, source: ImageSource, annotations: Annotations | None) -> list[Row]:
        """How well a network finds the annotated foregrounds; unreadable masks are noted once for all networks."""
        if annotations is None or grid_size(network.backbone.encoder) is None:
            return []
        chosen = fixed_sample(len(source), self.settings.count, self.settings.seed)
        annotated = annotated_images(annotations, source, chosen, network.backbone)
        if annotated.bad:
            named = and_more([f"{mask.location}: {mask.reason}" for mask in annotated.bad], 5, "; ")
            total = len(annotated.images) + len(annotated.bad)
            note = f"{len(annotated.bad)} of {total} masks of --foregrounds cannot be read and are left out: {named}."
            if note not in self.notes:
                self.notes.append(note)
        return score_foregrounds(network.backbone.encoder, annotated)

    def without_parts(self, pixels: Tensor, images: ProbeImages | None) -> tuple[list[AttentionUse], list[Removal]]:
        """The model without mixing, and without single parts, judged by its loss and, with labels, by a probe."""
        (model, source), settings = self.subjects["model"], self.settings
        net = model.net
        if not isinstance(net, MaskedAutoencoder):
            self.left_out["masked loss without mixing and without heads"] = "the model has no decoder"
            return [], []
        if images is None and settings.probe_images:
            try:
                images = split_probe_images(source, settings.probe_images, settings.seed)
            except UserError as error:
                self.left_out["linear probe without mixing"] = str(error)
        masks = nested_masks(len(pixels), net.num_patches, self.hidden, settings.seed)
        probe = None if images is None else partial(last_layer_score, model.backbone, images)
        use = attention_use(net, pixels, masks, probe=probe)
        if not use:
            self.left_out["masked loss without mixing"] = "no layer has attention in subspaces"
        if not settings.interventions:
            return use, []

        def announce(seconds: float) -> None:
            minutes = plural(max(1, round(seconds / 60)), "minute")
            self.report(f"the model without single heads and atoms, for about {minutes}")

        classifier = None if images is None else fitted_probe(model.backbone, images)
        return use, removals(net, pixels, masks, probe=classifier, seed=settings.seed, on_start=announce)

    def atoms(self, pixels: Tensor, removed: Sequence[Removal]) -> Gallery | None:
        """Atoms of the last layer of the encoder: those that matter first, if any were removed."""
        model, _ = self.subjects["model"]
        last = len(layers_of(model.backbone.encoder)) - 1
        first = {each.index for each in mattering(removed) if (each.kind, each.layer) == ("atom", last)}
        try:
            return measure_atoms(model.net, pixels, mattering=first, mask_ratio=self.hidden, seed=self.settings.seed)
        except UserError as error:
            self.left_out["atoms"] = str(error)
            return None


def _training_images(known: Training, settings: InspectOptions) -> Iterator[str]:
    """A sentence if the model was trained on the images that it is measured on."""
    if isinstance(settings.data, (str, Path)) and known.data == full_name(settings.data):
        yield (
            f"The model was trained on images of {settings.data}: what holds on these images may not hold on others."
        )


def _shortages(subjects: Subjects, measured: Sequence[SubjectMeasures], settings: InspectOptions) -> list[str]:
    """Sentences on sources that have fewer images than were asked for."""
    notes = []
    for found in measured:
        if found.measures.images < settings.count and found.key not in NETWORKS[1:]:
            bad = f" ({len(found.measures.bad)} cannot be read)" if found.measures.bad else ""
            held = len(subjects[found.key][1])
            notes.append(
                f"{found.measures.data} contains {held} images{bad}: {found.measures.images} were measured "
                f"instead of {settings.count}."
            )
    if measured[0].measures.images == 1:
        notes.append("With only one image, there are no intervals, and claims cannot be tested.")
    return notes


def _csv(kind: type, rows: Mapping[str, Sequence[Any]]) -> str:
    """Rows of several subjects as one table, whose first column names the subject."""
    names = [column.name for column in fields(kind)]
    return to_csv(
        ["subject", *names],
        ([subject, *(getattr(row, name) for name in names)] for subject, found in rows.items() for row in found),
    )
