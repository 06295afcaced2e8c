"""Panels of lines: what is drawn is what was given, and each label stands once above them."""

import pytest

from crate_mae.drawing.lines import Line, Panel, draw_panels
from crate_mae.drawing.style import GREY, colour


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_are_drawn_with_one_legend():
    lines = [
        Line("R^c", [0, 1], [3.0, 2.0], spread=[0.5, 0.25]),
        Line("R^c", [2, 3], [5.0, 4.0]),  # the same thing after a gap
        Line("control", [0, 1], [1.0, 1.0], 1, dashed=True),
        Line("", [0, 1], [2.0, 2.0], None),
    ]
    ticks = {0: "E0", 2: "D0"}
    first = Panel(lines, title="λ‖Z‖_0", xlabel="layer", ylabel="nats", ticks=ticks, divider=1.5)
    figure = draw_panels([first, Panel(lines[:1]), Panel(lines[2:3])], columns=2, width=3.0, height=2.0)
    axes = figure.axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != ":"]
    assert [list(line.get_ydata()) for line in drawn] == [line.y for line in lines]
    assert [line.get_linestyle() for line in drawn] == ["-", "-", "--", "-"]
    assert [line.get_color() for line in drawn] == [colour(0), colour(0), colour(1), GREY]
    assert len(axes.collections) == 1
    assert axes.collections[0].get_paths()[0].get_extents().y1 == 3.5
    assert (axes.get_title(), axes.get_ylabel()) == ("λ‖Z‖$_0$", "nats")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["E0", "D0"]
    assert labels(figure) == ["R$^c$", "control"]
    assert [panel.axison for panel in figure.axes] == [True, True, True, False]


def test_legends_inside_are_for_panels_of_several_lines():
    lines = [Line(name, [0, 1], [1.0, 2.0]) for name in ("a", "b")]
    figure = draw_panels([Panel(lines), Panel(lines[:1])], columns=1, width=3.0, height=2.0, legend="inside")
    assert not figure.legends
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False]


@pytest.mark.parametrize(
    ("scale", "values", "expected"),
    [
        ("auto", [1.0, 101.0], "log"),
        ("auto", [1.0, 99.0], "linear"),
        ("auto", [0.0, 101.0], "linear"),
        ("from zero", [1.0, 2.0], "linear"),
    ],
)
def test_scales_follow_the_values(scale, values, expected):
    panel = Panel([Line("", [0, 1], values)], scale=scale)
    (axes,) = draw_panels([panel], columns=1, width=3.0, height=2.0).axes
    assert axes.get_yscale() == expected
    assert (axes.get_ylim()[0] == 0) == (scale == "from zero")


def test_what_hardly_differs_is_not_magnified():
    panel = Panel([Line("", [0, 1], [100.0, 100.1])], scale="auto")
    (axes,) = draw_panels([panel], columns=1, width=3.0, height=2.0).axes
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(10, rel=0.01)
