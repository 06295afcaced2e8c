"""The files of a report: the page, its figures, and all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crate_mae.drawing.page import render
from crate_mae.drawing.style import encode
from crate_mae.drawing.text import plural
from crate_mae.interpret.audit import CLAIMS, CONTROLS, LEAST_MARGIN_SHARE, LEAST_SHARE_OF_IMAGES, AuditRow, by_claim
from crate_mae.interpret.layer_measures import EPS, SPARSITY_WEIGHT
from crate_mae.interpret.registry import MEASURES
from crate_mae.interpret.report.figures import Plan, draw_figures, plan_figures
from crate_mae.interpret.report.findings import VERDICT_RULE, verdict_sentence, write_findings
from crate_mae.interpret.report.inspection import Inspection, SubjectMeasures
from crate_mae.interpret.report.subjects import name_of

PAGE = "report.html"

_TOKENS = {
    "all": "All tokens: nothing is hidden",
    "visible": "As in training: the encoder sees the visible patches alone, the decoder fills in the hidden ones",
}


def report_files(inspection: Inspection) -> dict[str, bytes | str]:
    """The files of a report by their names in its folder; the page comes last, so that a folder with one is whole."""
    plan = plan_figures(inspection)
    figures = draw_figures(plan)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files: dict[str, bytes | str] = {f"figures/{name}.png": picture for name, picture in pictures.items()}
    files |= {f"figures/{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["measures.json"] = inspection.to_json()
    files |= inspection.tables()
    files[PAGE] = write_page(inspection, plan, pictures)
    return files


def write_page(inspection: Inspection, plan: Plan, pictures: Mapping[str, bytes]) -> str:
    """Write the page as HTML: what was found at a glance, then the sections.

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
        claims=[(CLAIMS[key], found) for key, found in by_claim(rows).items()],
        controls=CONTROLS,
        least_share_of_images=LEAST_SHARE_OF_IMAGES,
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
