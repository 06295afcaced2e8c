"""The style of figures: one set of colours, symbols and sizes."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.backend_bases import get_registered_canvas_class
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which can be distinguished with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
HEAT = "cividis"  # colours of maps, which look the same with any kind of colour vision
_COLOURS_OF_LINES = 256
_DPI = 130
_SETTINGS: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "image.composite_image": False,  # pictures side by side keep their own edges in a PDF file
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose panels make room for their labels."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(figure: Figure, rows: int, columns: int, **options: Any) -> Any:
    """An array of axes, rows x columns, in this style."""
    with rc_context(_SETTINGS):
        return figure.subplots(rows, columns, squeeze=False, **options)


def blank(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure, and axes without lines whose coordinates are inches from its upper left corner.

    A place on these axes takes far less time to draw than a panel of its own.
    """
    figure = Figure(figsize=(width, height))
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def draw_line(
    axes: Any,
    x: Sequence[float | int],
    means: Sequence[float | int],
    stds: Sequence[float | int],
    number: int,
    label: str,
    **options: Any,
) -> None:
    """A line with symbols, and a band of one standard deviation to either side.

    Args:
        axes: the panel.
        x: places.
        means: heights.
        stds: half widths of the band; empty for none.
        number: of the line's colour and symbol.
        label: for the legend.
        options: of matplotlib's lines.
    """
    style = {"color": colour(number), "marker": marker(number), "markersize": 5}
    axes.plot(x, means, label=label, linewidth=1.6, **{**style, **options})
    if not stds:
        return
    band = list(zip(means, stds, strict=True))
    low, high = [mean - std for mean, std in band], [mean + std for mean, std in band]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def colour(number: int) -> str:
    """The colour of thing number 0, 1, ..."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """The symbol of thing number 0, 1, ..."""
    return MARKERS[number % len(MARKERS)]


def legend_above(figure: Figure, axes: Any, columns: int) -> None:
    """The labels of one panel, once, above all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=10.5)


def encode(figure: Figure, kind: Literal["png", "pdf"]) -> bytes:
    """The file of a figure: the same bytes for the same figure, so without a date.

    Its parts are arranged once, which takes half of the time; they stay where they are if it is encoded again.
    A PNG file of lines alone has 256 colours, which makes it a third as large and looks the same; pictures keep theirs.
    """
    # A canvas is used directly, since `savefig` draws a figure twice: the first time only to arrange its parts.
    canvas: Any = get_registered_canvas_class(kind)(figure)
    figure.set_dpi(_DPI)
    with rc_context(_SETTINGS), BytesIO() as buffer:
        if kind == "pdf":
            canvas.print_pdf(buffer, metadata={"CreationDate": None})
        else:
            canvas.draw()
        figure.set_layout_engine("none")
        if kind == "pdf":
            return buffer.getvalue()
    opaque = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    has_pictures = any(axes.images for axes in figure.axes)
    smaller = opaque if has_pictures else opaque.quantize(_COLOURS_OF_LINES, dither=Image.Dither.NONE)
    with BytesIO() as buffer:
        smaller.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()
