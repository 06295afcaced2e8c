"""The sections of the page, in its order."""

from collections.abc import Mapping, Sequence
from html import escape

from crate_mae.drawing.page import figure, table
from crate_mae.interpret.layer_measures import EPS, SPARSITY_WEIGHT
from crate_mae.interpret.report.audit_table import LEGEND, all_numbers, controls_table, overview
from crate_mae.interpret.report.figures import Plan
from crate_mae.interpret.report.inspection import Inspection, Measured
from crate_mae.interpret.report.wording import VERDICT_RULE, Finding, Section, plural

_CONTROLS = (
    "A control is another network on the same images, or the model on other images. What is as good with random "
    "weights was not learned; what is better on training images was learned by heart."
)
_NOTHING = "<p>Nothing of this was measured; what is left out says why.</p>"
_FORMS = f"""<p>Z are the tokens of an image, one a row, U<sub>k</sub> the subspaces of a layer. The coding rate R(Z)
counts the nats to code all tokens up to a distortion ε = {EPS:g}, the subspace rate R<sup>c</sup>(Z | U) those to code
them inside each subspace. A rate grows with the length of tokens, and layers change lengths; so R<sup>c</sup> is given
in three forms:</p>
<ul>
<li><b>of tokens as they are</b>, the formula of the papers;</li>
<li><b>of normalised tokens</b>: after the normalisation in front of the layer’s attention, so as attention sees
them;</li>
<li><b>of unit-length projections</b>: the same, with every projection scaled to length 1, and 0.01 for ε². At the input
of the layer’s attention this is what the official code records, and is called “as the official code takes it” there and
nowhere else.</li>
</ul>
<p>R − R<sup>c</sup> is given for the tokens of all images together: an image has fewer tokens than dimensions, which
caps its R far below its R<sup>c</sup>.</p>
<p>A network whose attention is not MSSA has no subspaces. If its heads have values of their own, their projections
stand in for U<sub>k</sub>, in the last form alone, where the size of a projection does not count.</p>
<p class="small">E0, E1, … are layers of the encoder, D0, D1, … of the decoder, numbered from 0 as everywhere in
crate-mae. Rates also depend on the number of tokens and on their width: of networks of another shape compare how curves
go, and not how high they are. λ = {SPARSITY_WEIGHT:g} in λ‖Z‖<sub>0</sub>.</p>
"""
_WEIGHTS = """<p>What the derivation takes for granted about a layer’s weights, and whether each decoder layer undoes
its encoder layer (the first the last one, and so on), which it never was trained to do.</p>
"""
_ATTENTION = """<p>A few of the measured images, chosen by the seed. Maps of single heads are put together from passes
in which the image is shifted by less than a patch, and so are finer than the patches; in all others one value stands
for one patch.</p>
"""


def write_sections(
    inspection: Inspection, findings: Sequence[Finding], plan: Plan, pictures: Mapping[str, bytes]
) -> list[Section]:
    """Everything on the page below the glance.

    Args:
        inspection: what was measured.
        findings: what is said of it.
        plan: which figures stand in which section.
        pictures: PNG files, by the names of the figures.
    """

    def section(anchor: str, title: str, text: str) -> Section:
        shown = [
            f"<h3>{escape(f.title)}</h3>\n{figure(pictures[f.name], f.caption, f.title)}" for f in plan.get(anchor, [])
        ]
        return Section(anchor=anchor, title=title, body=text + "\n".join(shown))

    def figures(anchor: str, title: str, text: str) -> Section:
        return section(anchor, title, text if plan[anchor] else _NOTHING)

    return [
        section("model", "The model, and what it is compared with", _model(inspection)),
        section("findings", "Findings", _findings(findings)),
        figures("layers", "Layer by layer", _FORMS),
        section("audit", "Audit: each step against its controls", _audit(inspection)),
        figures("weights", "Weights: subspaces, dictionaries, inverses", _WEIGHTS),
        figures("attention", "What the class token looks at", _ATTENTION),
        figures("tokens", "What tokens stand for", ""),
        section("left-out", "What is left out, and how to make it again", _left_out(inspection)),
    ]


def _model(inspection: Inspection) -> str:
    facts = table([], [[escape(name), escape(text)] for name, text in inspection.description.items()])
    trained = [[escape(name), escape(text)] for name, text in inspection.training.items()]
    compared = table([], [[found.label, escape(_subject(found))] for found in inspection.measured])
    ratio = inspection.settings.mask_ratio
    hidden = (
        f"{100 * ratio:g}% of the patches were hidden while layers were measured."
        if ratio is not None
        else "Nothing was hidden while layers were measured."
    )
    return (
        f"{facts}\n"
        + (f"<h3>Its training</h3>\n{table([], trained)}\n" if trained else "")
        + f"<h3>What is measured</h3>\n{compared}\n<p>{_CONTROLS} {hidden}</p>\n"
    )


def _subject(found: Measured) -> str:
    """A network, its images and its shape."""
    m = found.measures
    weights = ", with random weights" if found.is_fresh else ""
    return f"{m.model}{weights}; {plural(m.images, 'image')} of {m.data}; {found.tokens}"


def _findings(findings: Sequence[Finding]) -> str:
    parts = []
    for found in findings:
        more = "".join(f"<li>{sentence}</li>" for sentence in found.more)
        parts.append(
            f'<h3 id="{found.anchor}">{escape(found.title)}</h3>\n<p class="glance">{found.answer}</p>\n'
            + (f"<ul>{more}</ul>\n" if more else "")
            + found.table
        )
    return "\n".join([*parts, f'<p class="small">{VERDICT_RULE}</p>\n'])


def _audit(inspection: Inspection) -> str:
    rows = inspection.model.measures.audit
    if not rows:
        return (
            "<p>The claims are about attention in subspaces and sparse coding, and no layer of this model has them.</p>"
        )
    return (
        f"<p>{LEGEND}</p>\n{overview(rows)}\n<h3>The controls</h3>\n{controls_table()}\n"
        "<details><summary>All numbers of the audit: values, margins, intervals, shares of images</summary>\n"
        f"{all_numbers(rows)}</details>\n"
        '<p class="small">Everything is paired: step and controls start from the same tokens of the same images, and '
        "the margin of an image is that over its best control. Intervals of mean margins are Student’s; those of "
        "claims on all images together are a jackknife’s. The untrained column is the largest margin of five untrained "
        "draws of the network, as a share of the value before. The same table is in <code>audit.csv</code>.</p>\n"
    )


def _left_out(inspection: Inspection) -> str:
    missing = [[escape(what), escape(why)] for what, why in inspection.left_out.items()]
    for found in inspection.measured:
        missing += [[f"{escape(what)}, {found.label}", escape(why)] for what, why in found.measures.left_out.items()]
    bad = {image.location: image.reason for found in inspection.measured for image in found.measures.bad}
    missing += [[escape(location), f"cannot be read: {escape(reason)}"] for location, reason in bad.items()]
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in inspection.versions.items())
    return f"""{table([], missing) if missing else "<p>Nothing.</p>"}
<h3>To make it again</h3>
<p><code>{escape(inspection.settings.command())}</code></p>
<p class="small">Images, masks and fresh weights are functions of the seed ({inspection.settings.seed}; random weights
take the next). All numbers are in <code>measures.json</code>, <code>measures.csv</code>, <code>audit.csv</code> and
<code>attention.csv</code>;
each figure is also a PNG and a PDF file in <code>figures</code>. Versions: {versions}.</p>
"""
