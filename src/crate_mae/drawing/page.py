"""Pages: one file with its figures inside, for a laptop, a phone and a printer; no network, no script."""

import base64
from collections.abc import Sequence
from html import escape

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
th { font-weight: 600; vertical-align: bottom; }
thead th { white-space: normal; }
thead th:first-child, th[scope=row], .facts td { text-align: left; white-space: normal; }
th[scope=row] { min-width: 9rem; vertical-align: top; font-weight: 400; }
.facts { overflow-wrap: anywhere; }
.facts th { color: #444; }
/* Verdicts differ in symbol and lightness as well as in colour. */
.holds, .fails, .theorem, .contradiction { text-align: center; }
.theorem { background: #9ccbe8; }
.contradiction { background: #d55e00; color: #fff; font-weight: 700; }
.holds { background: #cfe5f3; }
.fails { background: #f6c9a8; }
summary { cursor: pointer; color: #00558a; font-weight: 600; margin: .6rem 0; }
nav { font-size: .95rem; margin: .8rem 0; }
.limits { border-left: 4px solid #d55e00; padding-left: .9rem; }
figure { margin: 1.2rem 0; }
sup, sub { line-height: 0; }
/* What is wider than the screen is moved sideways: a shadow at an edge says that there is more beyond it. */
.wide { overflow-x: auto; background: linear-gradient(to right, #fff 30%, transparent) 0 0 / 2rem 100% local,
  linear-gradient(to left, #fff 30%, transparent) 100% 0 / 2rem 100% local,
  linear-gradient(to right, #0003, transparent) 0 0 / .6rem 100% scroll,
  linear-gradient(to left, #0003, transparent) 100% 0 / .6rem 100% scroll, #fff; background-repeat: no-repeat; }
figure img { display: block; width: 100%; height: auto; }
figcaption, footer, .small { font-size: .9rem; color: #444; }
a { color: #00558a; }
/* On a phone, figures keep a size at which their labels can be read, and are moved sideways. */
@media screen and (max-width: 44rem) { figure img { width: 44rem; max-width: none; } }
@media (min-width: 68rem) { figure { margin: 1.4rem -6rem; } figcaption { margin: 0 6rem; } }
@media print { .wide { overflow: visible; } nav { display: none; } tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .holds, .fails, .theorem, .contradiction { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  table { font-size: 8.5pt; } th, td { padding: .15rem .35rem; }
  body { max-width: none; font-size: 10.5pt; padding: 0; }
  h2, h3 { break-after: avoid; }
  figure { margin: .6rem 0; break-inside: avoid; } figcaption { margin: 0; } .formula { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: as text.
        body: as HTML, everything below the title.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def figure(png: bytes, caption: str, alt: str | None = None) -> str:
    """A picture inside the page.

    Args:
        png: the file.
        caption: HTML below it.
        alt: what is said of it where it cannot be seen; by default the caption.
    """
    source = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><div class="wide"><img src="data:image/png;base64,{source}" alt="{escape(alt or caption)}"></div>\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column says what each row is; on a narrow screen it is moved sideways.

    Args:
        header: HTML above each column; empty for a table of facts, a name and a text a row.
        rows: HTML of each cell, or whole `<td>` elements.
        caption: HTML above it.
    """
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = "".join(f'<tr><th scope="row">{first}</th>{"".join(map(_cell, rest))}</tr>\n' for first, *rest in rows)
    above = f"<caption>{caption}</caption>" if caption else ""
    head = f"<thead><tr>{heading}</tr></thead>" if header else ""
    kind = "" if header else ' class="facts"'
    return f'<div class="wide"><table{kind}>{above}{head}<tbody>\n{lines}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"
