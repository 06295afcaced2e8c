"""The two parts of the page that Gradio does not have: a chooser that makes no files, and a picture of patches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from crate_mae.app.examples import Example
from crate_mae.app.uploads import FORMATS, MAX_BYTES, TOO_LARGE, to_png, to_uri

_STATIC = Path(__file__).parent / "static"
_CHOOSER = """
<label class="drop"><input type="file" accept="image/*" aria-label="choose a picture">
<strong>Drop a picture here</strong>, or click to choose one<small>${formats}, up to ${max_megabytes} MB</small></label>
<div class="message" role="alert" hidden></div>
<div class="examples"></div>
"""


def static_text(name: str) -> str:
    """A script or style sheet of the page."""
    return (_STATIC / name).read_text(encoding="utf-8")


def chooser(picture: str, examples: Sequence[Example]) -> gr.HTML:
    """Where a picture is dropped or an example clicked; its value is the present picture.

    It triggers `upload` with the file's content, as an address that begins with "data:", and `select` with the number
    of an example; both with the number of the visitor's attempt, which comes back with what is said about it. Gradio's
    own component for images would write each of them to a file.

    Args:
        picture: the first, as such an address.
        examples: what is offered.
    """
    offered = [
        {"title": each.title, "credit": each.credit, "picture": to_uri(to_png(each.image.resize((64, 64))))}
        for each in examples
    ]
    return gr.HTML(
        picture,
        html_template=_CHOOSER,
        js_on_load=static_text("chooser.js"),
        elem_id="chooser",
        examples=offered,
        message=[0, ""],  # the attempt that it answers, and a sentence
        formats=", ".join(FORMATS),
        max_megabytes=MAX_BYTES // 2**20,
        max_bytes=MAX_BYTES,
        too_large=TOO_LARGE,
    )


def patch_grid(
    mode: Literal["paint", "pick"], picture: str, grid: tuple[int, int], value: str | int, **options: Any
) -> gr.HTML:
    """A picture of which patches can be hidden with a brush, or one be picked; it triggers `input`.

    Args:
        mode: "paint", whose value is a mask as `compute.mask_text` writes it; or "pick", whose value is the number of
            the patch.
        picture: as an address that begins with "data:".
        grid: rows and columns of patches.
        value: see above.
        options: of `gr.HTML`.
    """
    return gr.HTML(
        value,
        html_template=f'<div class="patch-grid {mode}"><img alt="" draggable="false">'
        '<div class="cells" role="group" aria-label="patches"></div></div>',
        js_on_load=static_text("patch_grid.js"),
        mode=mode,
        picture=picture,
        rows=grid[0],
        columns=grid[1],
        **options,
    )
