"""The page of the theory."""

from collections.abc import Mapping, Sequence
from html import escape

from crate_mae.drawing.page import figure, page
from crate_mae.interpret.theory.experiments import TheoryResults
from crate_mae.interpret.theory.wording import Section


def write_page(results: TheoryResults, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Args:
        results: what was measured.
        sections: what is said of it.
        pictures: PNG files, by the names of the sections' figures.
    """
    glances = "".join(f"<li><a href='#{s.figure}'>{escape(s.title)}</a>: {s.glance}</li>" for s in sections)
    body = "".join(
        _section(number, section, pictures[section.figure]) for number, section in enumerate(sections, start=1)
    )
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in results.versions.items())
    content = f"""<p>Every layer of CRATE-MAE is derived from a statement about tokens near a few low-dimensional
subspaces. Here the statements are put to the test on data that obey the assumptions: noisy mixtures of Gaussians on
known subspaces. What fails here can hold in a trained network only for other reasons; what holds here may still fail
there.</p>
<h2>At a glance</h2>
<ul>{glances}</ul>
<p class="small">Tokens Z are rows; U<sub>k</sub> is an orthonormal basis of subspace k, and W<sub>k</sub> =
Z U<sub>k</sub>; n tokens of width d, h subspaces of dimension p; a = p/(n ε²). Numbers are means ± standard deviations
over independent draws.</p>
{body}
<footer><h2>To make it again</h2>
<p><code>crate-mae theory --out DIR --seed {results.seed}</code></p>
<p>All numbers are in <code>theory.json</code>; each figure is also a PNG and a PDF file. Versions:
{versions}.</p></footer>"""
    return page("The theory of CRATE-MAE, checked", content)


def _section(number: int, section: Section, picture: bytes) -> str:
    found = "".join(f"<li>{sentence}</li>" for sentence in section.found)
    limits = "".join(f"<li>{sentence}</li>" for sentence in section.limits)
    return f"""<section id="{section.figure}">
<h2>{number}. {escape(section.title)}</h2>
<p class="glance">{section.glance}</p>
<h3>The claim</h3>
<p>{section.claim}</p>
<p class="formula">{section.formula}</p>
<h3>How it was tested</h3>
<p>{section.how}</p>
{figure(picture, section.caption)}
<h3>What came out</h3>
<ul>{found}</ul>
<div class="wide">{section.table}</div>
<h3>Where it fails</h3>
<div class="limits"><ul>{limits}</ul></div>
</section>
"""
