"""The page: one file with its figures inside, for a laptop, a phone and a printer."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from crate_mae.interpret.theory.experiments import TheoryResults
from crate_mae.interpret.theory.wording import Section

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1.2rem 4rem; color: #1a1a1a; background: #fff;
  font: 1.05rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.2rem 0 .6rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; color: #00558a; }
p, ul { margin: .3rem 0 .8rem; }
ul { padding-left: 1.2rem; }
li { margin-bottom: .45rem; }
.formula { font-family: "STIX Two Text", Cambria, Georgia, serif; background: #f3f6f9; border-left: 4px solid #0072b2;
  padding: .6rem .8rem; line-height: 1.9; }
.glance { font-weight: 600; }
table { overflow-wrap: normal; white-space: nowrap; border-collapse: collapse;
  margin: .6rem 0 1rem; font-size: .95rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; }
caption { text-align: left; font-size: .9rem; color: #444; padding-bottom: .3rem; white-space: normal; }
th { font-weight: 600; }
.limits { border-left: 4px solid #d55e00; padding-left: .9rem; }
figure { margin: 1.2rem 0; }
.wide { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figcaption, footer, .small { font-size: .9rem; color: #444; }
a { color: #00558a; }
/* On a phone, figures keep a size at which their labels can be read, and are moved sideways. */
@media screen and (max-width: 44rem) { figure img { width: 44rem; max-width: none; } }
@media (min-width: 68rem) { figure { margin: 1.4rem -6rem; } figcaption { margin: 0 6rem; } }
@media print { .wide { overflow: visible; } body { max-width: none; font-size: 10.5pt; padding: 0; }
  h2, h3 { break-after: avoid; }
  figure { margin: .6rem 0; break-inside: avoid; } figcaption { margin: 0; } .formula { break-inside: avoid; } }
"""


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
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The theory of CRATE-MAE, checked</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>The theory of CRATE-MAE, checked</h1>
<p>Every layer of CRATE-MAE is derived from a statement about tokens near a few low-dimensional subspaces. Here the
statements are put to the test on data that obey the assumptions: noisy mixtures of Gaussians on known subspaces.
What fails here can hold in a trained network only for other reasons; what holds here may still fail there.</p>
<h2>At a glance</h2>
<ul>{glances}</ul>
<p class="small">Tokens Z are rows; U<sub>k</sub> is an orthonormal basis of subspace k, and W<sub>k</sub> =
Z U<sub>k</sub>; n tokens of width d, h subspaces of dimension p; a = p/(n ε²). Numbers are means ± standard deviations
over independent draws.</p>
{body}
<footer><h2>To make it again</h2>
<p><code>crate-mae theory --out DIR --seed {results.seed}</code></p>
<p>All numbers are in <code>theory.json</code>; each figure is also a PNG and a PDF file. Versions:
{versions}.</p></footer>
</body>
</html>
"""


def _section(number: int, section: Section, picture: bytes) -> str:
    source = base64.b64encode(picture).decode("ascii")
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
<figure><div class="wide"><img src="data:image/png;base64,{source}" alt="{escape(section.caption)}"></div>
<figcaption>{section.caption}</figcaption></figure>
<h3>What came out</h3>
<ul>{found}</ul>
<div class="wide">{section.table}</div>
<h3>Where it fails</h3>
<div class="limits"><ul>{limits}</ul></div>
</section>
"""
