r"""Mathematics between dollars, `$...$` in a line and `$$...$$` by itself, becomes MathML while the site is built.

Browsers draw MathML themselves, so pages need no script and no network. A Markdown extension, named in `zensical.toml`.
"""

import html
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, *, display: str) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802, ARG002  (Markdown's name)
        element = convert_to_element(m[1].strip(), display=self.display)
        for node in element.iter():
            node.text = html.unescape(node.text or "")  # The converter writes entities, to be escaped no more.
        element.set("alttext", m[1].strip())  # what is read aloud where MathML is not understood
        formula = ElementTree.tostring(element, encoding="unicode")
        return self.md.htmlStash.store(formula), m.start(0), m.end(0)


class _InnerProduct(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802, ARG002  (Markdown's name)
        return self.md.htmlStash.store("&lt;"), m.start(0), m.end(0)


class MathML(Extension):
    """Formulas in LaTeX, drawn by the browser; and inner products such as <a, b> in docstrings, which are no tags."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  (Markdown's name)
        """Read formulas after code (priority 190), where a dollar is a dollar, and before escapes (180)."""
        block, inline = r"\$\$(.+?)\$\$", r"(?<![\\$\w])\$(?=\S)([^$\n]+?)\$(?!\w)"
        md.inlinePatterns.register(_Formula(block, md, display="block"), "math-block", 186)
        md.inlinePatterns.register(_Formula(inline, md, display="inline"), "math", 185)
        md.inlinePatterns.register(_InnerProduct(r"<(?=\w+, \w+>)", md), "inner-product", 95)  # before tags (90)


def makeExtension(**options: Any) -> MathML:  # noqa: N802  (Markdown's name)
    """What Markdown calls to get the extension."""
    return MathML(**options)
