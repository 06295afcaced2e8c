"""Reports in HTML: one file with its figures inside, for a laptop, a phone and a printer; no network, no script.

They are Jinja2 templates beside the code that fills them in. Each extends `drawing/report.html.j2`, and
takes tables and figures from `drawing/macros.html.j2`. Everything is escaped; `| html` also typesets formulas, see
`drawing.text`.
"""

import base64
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from crate_mae.drawing.text import html, number, percent, plural, signed


class Table(NamedTuple):
    """A table whose first column says what each row is: the arguments of the macro `table`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: its path below `crate_mae`, such as "interpret/report/report.html.j2".
        values: what it names.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """The templates of the package; a name that a template does not get is an error."""
    found = Environment(
        loader=PackageLoader("crate_mae", ""),
        autoescape=select_autoescape(["html.j2"]),  # cards of models are Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "html": html,
        "number": number,
        "percent": percent,
        "plural": plural,
        "signed": signed,
    }
    return found
