from io import BytesIO

import numpy as np
from PIL import Image

from crate_mae.drawing.style import draw_line, encode, new_figure, panels


def lines():
    figure = new_figure(4.0, 3.0)
    axes = panels(figure, 1, 1)[0, 0]
    for number in range(5):
        draw_line(axes, [0, 1, 2], [number, 2, number + 1], [0.3, 0.2, 0.1], number, f"line {number}")
    axes.set_xlabel("layer")
    return figure


def drawn_without_a_palette(figure):
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def pixels(file):
    with Image.open(BytesIO(file)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_lines_are_a_smaller_file_that_looks_the_same():
    small, full = encode(lines(), "png"), drawn_without_a_palette(lines())
    assert len(small) < len(full) / 2
    difference = np.abs(pixels(small) - pixels(full))
    assert difference.mean() < 0.2 and np.quantile(difference, 0.999) <= 16


def test_pictures_keep_their_colours():
    figure = new_figure(4.0, 4.0)
    noise = np.random.default_rng(0).random((37, 41, 3)).astype(np.float32)
    panels(figure, 1, 1)[0, 0].imshow(noise, interpolation="nearest")
    assert len(np.unique(pixels(encode(figure, "png")).reshape(-1, 3), axis=0)) > 1000


def test_the_same_figure_is_the_same_file():
    for kind in ("png", "pdf"):
        assert encode(lines(), kind) == encode(lines(), kind)
