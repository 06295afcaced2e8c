"""The HTML of a report: which figures there are, in which section, how to read them, and the files with all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from matplotlib.figure import Figure

from crate_mae.drawing.lines import Line, Panel, draw_panels
from crate_mae.drawing.measures import INVERSES, MEASURES
from crate_mae.drawing.style import encode
from crate_mae.drawing.templates import render
from crate_mae.drawing.text import listed, number, plural
from crate_mae.interpret.atoms import Atom
from crate_mae.interpret.audit import (
    CLAIMS,
    COMPRESS,
    CONTROLS,
    LARGEST_P,
    LASSO,
    LEAST_MARGIN_SHARE,
    LEAST_SHARE_OF_IMAGES,
    UNTRAINED_DRAWS,
    AuditRow,
    by_claim,
)
from crate_mae.interpret.curves import POINT_NAMES, Curve, both_parts, layer_panel
from crate_mae.interpret.foregrounds import CONTROLS as FOREGROUND_CONTROLS
from crate_mae.interpret.foregrounds import KINDS
from crate_mae.interpret.layer_measures import EPS, SPARSITY_WEIGHT
from crate_mae.interpret.pictures import atom_tiles
from crate_mae.interpret.report.examples import PlannedFigure, draw_grid
from crate_mae.interpret.report.findings import VERDICT_RULE, verdict_sentence, write_findings
from crate_mae.interpret.report.inspection import Inspection, SubjectMeasures
from crate_mae.interpret.report.options import name_of
from crate_mae.interpret.report.subjects import LABELS, NETWORKS

REPORT_FILE = "report.html"

_TOKENS = {
    "all": "All tokens: nothing is hidden",
    "visible": "As in training: the encoder sees the visible patches alone, the decoder fills in the hidden ones",
}
_WIDTH, _PANEL_HEIGHT = 11.0, 3.2  # inches
_MORE_ROOM = 4  # as many panels are drawn in two columns
_COLOUR_OF = {key: number for number, key in enumerate(LABELS)}
_CONTROL = len(LABELS)  # colour of a control that is not a network
_TEXTS = {  # of each figure over the layers: its title, and two sentences on how to read it
    "subspace_rates": (
        "The subspace rate, layer by layer",
        "Means over images, with 95% intervals, of R^c between the two steps of each layer (in the encoder, after the "
        "attention step) and, on the right, of the projections in the layer’s attention; dashed lines are stand-ins "
        "for networks without subspaces. The derivation predicts that solid lines fall from left to right through the "
        "encoder (E) and rise through the decoder (D).",
    ),
    "within_layers": (
        "R^c before, between and after the steps of a layer",
        "For the model alone, R^c of the same images at three points of each layer, measured with that layer’s own "
        "subspaces: its input (circles), after its first step (squares), its output (triangles). ",
    ),
    "mixing": (
        "How much attention mixes",
        "On the left, at 1 no token reads any other, and the dashed line is uniform attention. On the right, below 1 "
        "tokens shrink, which lowers R^c as it is without sorting anything.",
    ),
    "rates": (
        "Coding rate, rate reduction, number of non-zeros",
        "Each line is a measure of the layers’ outputs. In an encoder that optimises its objective, R - R^c rises and "
        "λ‖Z‖_0 falls from left to right.",
    ),
    "sparsity": (
        "Sparsity",
        "Each panel shows how sparse the layers’ outputs are by one measure: only the first counts exact zeros; "
        "a small l1/l2 and a large Gini index mean sparse. If depth makes representations sparser, the left and "
        "right panels rise through the encoder and the middle one falls.",
    ),
    "ranks": (
        "Directions in use",
        "Each line is a measure of the layers’ outputs. Ranks near 1 and differences near 0 mean that tokens have "
        "become similar, which makes every rate small without any structure.",
    ),
    "information": (
        "Information kept, and idle coordinates",
        "Each line is a measure of the layers’ outputs. Higher is better, except for the share of dead coordinates.",
    ),
    "weights": (
        "Subspaces, output projections, dictionaries",
        "Each line is a measure of the weights alone, averaged over heads or pairs of heads; the derivation assumes "
        "bases that are orthonormal (error 0), heads that are incoherent (cosine 0), output projections equal to the "
        "bases (cosine 1) and dictionaries near an isometry (error 0). The line of random initialisation shows what "
        "chance gives in these dimensions: only the difference from it was learned.",
    ),
    "inverses": (
        "Does a decoder layer invert its encoder layer?",
        "For each encoder layer: how closely its decoder layer recovers its input, on tokens (cosine and error of the "
        "input) and by weights (the others). A layer is an inverse only if it is better than the dashed line of the "
        "same colour, each network’s controls: unchanged tokens for the measures on tokens, and all other decoder "
        "layers for the measures of weights.",
    ),
    "foreground_scores": (
        "How well foregrounds are found",
        "Each line shows how well the foregrounds found by a layer agree with the annotated ones: their IoU, and the "
        "share of images in which the box of the foreground is right; the best head of a layer is chosen on every "
        "other image and scored on the rest. Only values above random initialisation and above the dashed line, the "
        "best foreground that needs no network, were learned.",
    ),
}
_AT_A_GLANCE = (
    (COMPRESS, "Attention should lower R^c"),
    (LASSO, "Codes should lower the lasso objective"),
)
_STEPS_OF_A_STAND_IN = (
    "The model has no subspaces, so these are of its stand-in, and nothing predicts where squares should lie."
)
_STEPS_OF_A_LAYER = (
    "In the encoder the first step is attention, so squares should lie below circles; in the decoder the second step "
    "is attention with a minus sign, so triangles should lie above squares."
)

Panels = dict[str, list[Curve]]  # by their titles
Plan = Mapping[str, Sequence[PlannedFigure]]  # from a section's anchor to its figures


def report_files(inspection: Inspection) -> dict[str, bytes | str]:
    """The files of a report by their names in its folder; the HTML comes last, so that a folder with it is complete."""
    plan = plan_figures(inspection)
    figures = draw_figures(plan)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files: dict[str, bytes | str] = {f"figures/{name}.png": picture for name, picture in pictures.items()}
    files |= {f"figures/{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["measures.json"] = inspection.to_json()
    files |= inspection.tables()
    files[REPORT_FILE] = write_html(inspection, plan, pictures)
    return files


def write_html(inspection: Inspection, plan: Plan, pictures: Mapping[str, bytes]) -> str:
    """Write the report as HTML: the findings at a glance, then the sections.

    Args:
        inspection: what was measured.
        plan: the figures of each section.
        pictures: PNG files, by the names of the figures.
    """
    rows = inspection.model.measures.audit
    measured = {row.measure for found in inspection.measured for row in found.measures.rows}
    return render(
        "interpret/report/report.html.j2",
        title=f"Inside {name_of(inspection.settings.model)}",
        model=name_of(inspection.settings.model),
        inspection=inspection,
        findings=write_findings(inspection),
        verdict=verdict_sentence(inspection),
        verdict_rule=VERDICT_RULE,
        plan=plan,
        pictures=pictures,
        subjects=[(found.label, _describe(found)) for found in inspection.measured],
        eps=EPS,
        sparsity_weight=SPARSITY_WEIGHT,
        measures={name: measure for name, measure in MEASURES.items() if name in measured},
        audit=_audit_tables(rows),
        claims=[
            (CLAIMS[key].text, MEASURES[CLAIMS[key].measure].label, found) for key, found in by_claim(rows).items()
        ],
        controls=CONTROLS,
        least_share_of_images=LEAST_SHARE_OF_IMAGES,
        largest_p=LARGEST_P,
        untrained_draws=UNTRAINED_DRAWS,
        least_margin_share=LEAST_MARGIN_SHARE,
        left_out=_left_out(inspection),
    )


def _describe(found: SubjectMeasures) -> str:
    """A network, its images and its shape."""
    m = found.measures
    weights = ", with random initialisation" if found.is_random else ""
    return f"{m.model}{weights}; {plural(m.images, 'image')} of {m.data}; {found.tokens}"


def _audit_tables(rows: Sequence[AuditRow]) -> list[tuple[str, list[list[AuditRow]]]]:
    """Claims, a row of each, for each kind of tokens and part of the network; the first of a kind has its title."""
    tables = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        title = _TOKENS[tokens]
        for part in ("encoder", "decoder"):
            claims = list(by_claim(row for row in rows if (row.part, row.tokens) == (part, tokens)).values())
            if claims:
                tables.append((title, claims))
                title = ""
    return tables


def _left_out(inspection: Inspection) -> list[tuple[str, str]]:
    """What is left out and why, images that cannot be read among it."""
    missing = list(inspection.left_out.items())
    for found in inspection.measured:
        missing += [(f"{what}, {found.label}", why) for what, why in found.measures.left_out.items()]
    bad = {image.location: image.reason for found in inspection.measured for image in found.measures.bad}
    return missing + [(location, f"cannot be read: {reason}") for location, reason in bad.items()]


def plan_figures(inspection: Inspection) -> Plan:
    """The figures of each section, without empty ones."""
    examples, measured = inspection.examples.figures, inspection.measured
    networks = [found for found in measured if found.key in NETWORKS]
    return {
        "glance": _at_a_glance(inspection.model.measures.audit),
        "model": examples["model"],
        "layers": _planned(
            subspace_rates=_by_subject(measured, "subspace_rate", "subspace_rate_normalised", "subspace_rate_official"),
            within_layers=_within_layers(inspection.model),
            mixing=_mixing(inspection),
            rates=_by_subject(
                measured, "coding_rate", "coding_rate_normalised", "pooled_rate_reduction", "sparsity_penalty"
            ),
            sparsity=_sparsity(inspection),
            ranks=_by_subject(
                measured, "effective_rank", "participation_ratio", "best_subspace_energy", "token_diversity"
            ),
            information=_by_subject(measured, "pixel_r2", "feature_rank", "dead_coordinates", "probe_accuracy"),
        ),
        "weights": _planned(
            weights=_by_subject(
                networks,
                "orthonormality_error_scaled",
                "head_coherence",
                "head_affinity",
                "output_cosine",
                "dictionary_isometry_error_scaled",
                "dictionary_coherence",
            ),
            inverses=_inverses(networks),
        ),
        "attention": [*examples["attention"], *_planned(foreground_scores=_foregrounds(inspection))],
        "tokens": examples["tokens"],
        "atoms": _atoms(inspection),
    }


def draw_figures(plan: Plan) -> dict[str, Figure]:
    """Draw every figure; by the names of their files."""
    return {figure.name: figure.draw() for section in plan.values() for figure in section}


def _draw_panels(panels: Sequence[Panel]) -> Figure:
    columns = 2 if len(panels) == _MORE_ROOM else min(3, len(panels))
    return draw_panels(panels, columns=columns, width=_WIDTH / columns, height=_PANEL_HEIGHT)


def _at_a_glance(audit: Sequence[AuditRow]) -> list[PlannedFigure]:
    """What the two steps of an encoder layer do to what they are derived to lower, beside their best controls."""
    panels, answers = [], []
    for claim, title in _AT_A_GLANCE:
        rows = [row for row in audit if (row.tokens, row.part, row.claim) == ("all", "encoder", claim)]
        if not rows:
            return []
        layers = [float(row.layer) for row in rows]
        lines = [
            Line("the best control", layers, [row.after + row.margin for row in rows], _CONTROL, dashed=True),
            Line("the model", layers, [row.after for row in rows], 0),
        ]
        if claim == COMPRESS:
            lines.append(Line("before attention", layers, [row.before for row in rows], None))
        ticks = {float(row.layer): row.place for row in rows}
        panels.append(Panel(lines, title, ylabel=MEASURES[CLAIMS[claim].measure].label, scale="from zero", ticks=ticks))
        answers.append(listed([row.place for row in rows if row.margin > 0]) or "no layer")
    caption = (
        "Means over images; each step should lie below its best control. For attention and R^c, this is the case in "
        f"{answers[0]}; for the code and the lasso objective, in {answers[1]}."
    )
    return [PlannedFigure("glance", "The two steps of each encoder layer", caption, partial(_draw_panels, panels))]


def _planned(**figures: Panels) -> list[PlannedFigure]:
    """Figures by their names, without those that have no panels."""
    planned = []
    for name, panels in figures.items():
        title, caption = _TEXTS[name]
        if name == "within_layers":
            is_stand_in = any(curve.dashed for curves in panels.values() for curve in curves)
            caption += _STEPS_OF_A_STAND_IN if is_stand_in else _STEPS_OF_A_LAYER
        if panels:
            drawn = [layer_panel(of_measure, curves) for of_measure, curves in panels.items()]
            planned.append(PlannedFigure(name, title, caption, partial(_draw_panels, drawn)))
    return planned


def _by_subject(
    subjects: Sequence[SubjectMeasures], *measures: str, beside: Mapping[str, Curve] | None = None
) -> Panels:
    """A panel for each measure that any subject has, with a curve for each subject that has it, and one beside them."""
    panels = {}
    for name in measures:
        curves = [_curve(subject, name, MEASURES[name].point) for subject in subjects]
        if found := [curve for curve in curves if curve is not None]:
            panels[MEASURES[name].label] = [*found, beside[name]] if beside and name in beside else found
    return panels


def _curve(subject: SubjectMeasures, measure: str, point: str) -> Curve | None:
    """A subject's curve; its stand-in for R^c of unit-length projections, if it has no subspaces."""
    if rows := both_parts(subject.measures.rows, measure, point):
        return Curve(subject.label, _COLOUR_OF[subject.key], rows)
    is_unit = measure in ("subspace_rate_unit", "subspace_rate_official")
    if is_unit and (rows := both_parts(subject.measures.rows, "value_rate_official", point)):
        return Curve(f"{subject.label} (stand-in)", _COLOUR_OF[subject.key], rows, dashed=True)
    return None


def _within_layers(model: SubjectMeasures) -> Panels:
    panels = {}
    for measure in ("subspace_rate", "subspace_rate_normalised", "subspace_rate_unit"):
        curves = [
            curve._replace(label=label, number=number)
            for number, (point, label) in enumerate(POINT_NAMES.items())
            if (curve := _curve(model, measure, point))
        ]
        if curves:
            panels[MEASURES[measure].label] = curves
    return panels


def _mixing(inspection: Inspection) -> Panels:
    control = MEASURES["self_attention"].control
    uniform = both_parts(inspection.model.measures.rows, control)
    beside = {"self_attention": Curve(MEASURES[control].title, _CONTROL, uniform, dashed=True)}
    return _by_subject(inspection.measured, "self_attention", "length_ratio", beside=beside)


def _sparsity(inspection: Inspection) -> Panels:
    measures = ("zero_fraction", "l1_to_l2", "gini")
    beside = {}
    for measure in measures:
        codes, tokens = (inspection.model.find(measure, point) for point in ("code", "z_next"))
        # Codes are the layer's output, except with a skip connection or a separate dictionary.
        if [row.mean for row in codes] != [row.mean for row in tokens] and codes:
            beside[measure] = Curve("the model’s codes", _CONTROL, codes, dashed=True)
    return _by_subject(inspection.measured, *measures, beside=beside)


def _inverses(networks: Sequence[SubjectMeasures]) -> Panels:
    panels = {}
    for measure in INVERSES:
        curves = []
        for subject in networks:
            number, control = _COLOUR_OF[subject.key], MEASURES[measure].control
            curves += [
                Curve(subject.label, number, subject.find(measure)),
                Curve(f"{subject.label}: its control", number, subject.find(control), dashed=True),
            ]
        if found := [curve for curve in curves if curve.rows]:
            panels[MEASURES[measure].label] = found
    return panels


def _atoms(inspection: Inspection) -> list[PlannedFigure]:
    """The gallery of atoms; none if they were not measured."""
    gallery = inspection.atoms
    if gallery is None:
        return []
    title = f"Atoms of encoder layer {gallery.atoms[0].layer}"
    return [PlannedFigure("atoms", title, _linearity(gallery.atoms), partial(draw_grid, atom_tiles(gallery)))]


def _linearity(atoms: Sequence[Atom]) -> str:
    """How much atoms change, and how far their contributions add up, beside random directions."""
    change, at_random = number(fmean(a.change for a in atoms)), number(fmean(a.random_change for a in atoms))
    text = (
        f"Raised by a standard deviation, these atoms change hidden pixels in [0, 1] by {change} on average (root mean "
        f"square), and random directions of the code, with steps as long, by {at_random}. "
    )
    pairs = [(a.cosine, a.random_cosine, a.random_cosine_low) for a in atoms]
    known = [pair for pair in pairs if None not in pair]
    if not known:
        return text + "That is too little to compare with a linear response."
    own, random, lowest = zip(*known, strict=True)
    below = sum(cosine < low for cosine, low in zip(own, lowest, strict=True))
    return text + (
        f"The cosine with the linear response is {fmean(own):.3f} (mean over {plural(len(own), 'atom')}) and "
        f"{fmean(random):.3f}, and {below} of these atoms respond less linearly than all random directions."
    )


def _foregrounds(inspection: Inspection) -> Panels:
    """Foregrounds against the annotated ones; without panels if there are none."""
    panels = {}
    for measure, short in (("foreground_iou", "IoU"), ("correct_localisation", "right boxes")):
        controls = {name: inspection.model.find(measure, name) for name in FOREGROUND_CONTROLS}
        best = max(controls, key=lambda name: controls[name][0].mean if controls[name] else 0.0)
        for kind in KINDS:
            curves = [_curve(subject, measure, kind) for subject in inspection.measured]
            if found := [curve for curve in curves if curve is not None]:
                control = Curve(f"{best}, the best control", _CONTROL, controls[best], dashed=True)
                panels[f"By {kind}: {short}"] = [*found, control]
    return panels
