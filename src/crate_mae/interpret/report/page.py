"""The page, and every other file of a report."""

from collections.abc import Sequence
from html import escape

from crate_mae.drawing.page import page
from crate_mae.drawing.style import encode
from crate_mae.interpret.report.figures import draw_figures, plan_figures
from crate_mae.interpret.report.findings import write_findings
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.sections import write_sections
from crate_mae.interpret.report.settings import name_of
from crate_mae.interpret.report.wording import Finding, Section

PAGE = "report.html"


def report_files(inspection: Inspection) -> dict[str, bytes]:
    """The files of a report by their names in its folder; the page comes last, so that a folder with one is whole."""
    plan = plan_figures(inspection)
    figures = draw_figures(plan)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files = {f"figures/{name}.png": picture for name, picture in pictures.items()}
    files |= {f"figures/{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["measures.json"] = inspection.to_json().encode()
    files["measures.csv"] = inspection.to_csv().encode()
    files["audit.csv"] = inspection.audit_csv().encode()
    files["attention.csv"] = inspection.attention_csv().encode()
    findings = write_findings(inspection)
    sections = write_sections(inspection, findings, plan, pictures)
    files[PAGE] = write_page(inspection, findings, sections).encode()
    return files


def write_page(inspection: Inspection, findings: Sequence[Finding], sections: Sequence[Section]) -> str:
    """The page as HTML: what was found at a glance, then the sections."""
    model = escape(name_of(inspection.settings.model))
    images = inspection.model.measures
    glances = "".join(
        f'<li><a href="#{found.anchor}">{escape(found.title)}</a> {found.answer}</li>\n' for found in findings
    )
    links = " · ".join(
        f'<a href="#{section.anchor}">{number}. {escape(section.title)}</a>'
        for number, section in enumerate(sections, start=1)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in inspection.notes)
    body = "".join(
        f'<section id="{section.anchor}">\n<h2>{number}. {escape(section.title)}</h2>\n{section.body}</section>\n'
        for number, section in enumerate(sections, start=1)
    )
    content = f"""<p>Every layer of a CRATE-MAE is derived: it is to compress tokens against its subspaces, and to make
them sparse in its dictionary. Here <b>{model}</b> is measured on {images.images:,} images of
<b>{escape(images.data)}</b>, and each step is compared with controls: moves that need no derivation, and networks
without its training.</p>
<h2>At a glance</h2>
<ul>
{glances}</ul>
{f'<div class="limits"><ul>{notes}</ul></div>' if notes else ""}
<nav>{links}</nav>
{body}"""
    return page(f"Inside {name_of(inspection.settings.model)}", content)
