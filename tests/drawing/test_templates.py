"""Templates: whatever a user wrote is text, and whatever a template needs it must get."""

import pytest
from jinja2 import TemplateNotFound, UndefinedError
from markupsafe import Markup

from crate_mae.drawing.templates import _environment, render


@pytest.fixture
def macros():
    return _environment().get_template("drawing/macros.html.j2").module


def test_text_is_escaped():
    text = render("drawing/report.html.j2", title="<b> & co")
    assert text.startswith("<!doctype html>")
    assert text.count("&lt;b&gt; &amp; co") == 2 and "<b>" not in text
    assert "max-width: 52rem" in text


def test_a_picture_is_inside_the_page_with_a_text(macros):
    text = macros.figure(b"png", Markup("R<sup>c</sup>"), 'a "b" <c>')
    assert 'src="data:image/png;base64,cG5n"' in text
    assert 'alt="a &#34;b&#34; &lt;c&gt;"' in text and "<figcaption>R<sup>c</sup></figcaption>" in text
    assert "<figcaption>R<sup>c</sup> &lt;3</figcaption>" in macros.figure(b"png", "R^c <3", "")


def test_a_table_has_its_cells_in_order(macros):
    text = macros.table(["", "a"], [["x", "1"], ["y", "2"]], "caption")
    assert text.index("caption") < text.index(">a<") < text.index(">x<") < text.index(">1<") < text.index(">y<")


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(UndefinedError):
        render("drawing/report.html.j2")
    with pytest.raises(TemplateNotFound):
        render("drawing/nothing.html.j2")
