"""The interface of the app, with the handler that each event calls, and its web server."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import uvicorn
from fastapi import FastAPI

from crate_mae.app.compute import AppModel
from crate_mae.app.handlers import (
    ALONE,
    LEAST_RATIO,
    MOST_AMOUNT,
    MOST_RATIO,
    UNTRAINED,
    Controls,
    Handlers,
    refusing,
)
from crate_mae.app.limits import MOST_CONNECTIONS, LargeRequests, RequestLimits
from crate_mae.app.pictures import FORMATS, MAX_BYTES, TOO_LARGE, Example, to_png, to_uri
from crate_mae.data.files import reason_of
from crate_mae.errors import UserError

_MAX_WAITING = 64  # requests; later ones are refused
_TITLE = "CRATE-MAE: hide most of a picture and see it completed"
_INTRO = """<div class="intro"><h1>Hide most of a picture and see it completed</h1>
<p>CRATE-MAE is a neural network in which every layer is derived to compress its input and to make it sparse. Paint over
parts of a picture, see what the network predicts there, and look at what each of its layers did.</p></div>"""
_PICTURE = (
    "1. Choose a picture",
    "It stays in this browser tab. The server keeps it in memory while it responds and never writes it to disk.",
)
_HIDE = (
    "2. Hide patches",
    "Draw over patches to hide them; start on a hidden patch to uncover it and others. "
    '<span class="touch">Start a stroke sideways: up and down scrolls the page.</span>',
)
_COMPLETED = (
    "3. See it completed",
    "PSNR of the hidden patches, in decibels: higher is closer to the original.",
)
_INSIDE = (
    "4. Look inside, layer by layer",
    "What the encoder computes from the whole picture, with nothing hidden. Each patch is a token; similar tokens have "
    "similar colours. Click a patch: the map of a head shows where that patch attends to, from dark (nowhere) to "
    "yellow (the maximum of that map).",
)
_CHANGE = (
    "5. Change an atom, and see what it draws",
    "An atom is one coordinate of the layer's sparse code. Raise or lower it in every visible patch: the decoder draws "
    "the hidden patches anew. Choose the layer above.",
)
_STATIC = Path(__file__).parent / "static"
_CHOOSER = """
<label class="drop"><input type="file" accept="image/*" aria-label="choose a picture">
<strong>Drop a picture here</strong>, or click to choose one<small>${formats}, up to ${max_megabytes} MB</small></label>
<div class="message" role="alert" hidden></div>
<div class="examples"></div>
"""
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # fonts of the visitor's machine


def build_server(models: dict[str, AppModel], host: str) -> uvicorn.Server:
    """Build the server of the app, for models by name; call its `run(sockets=[...])` with a socket of `listen`."""
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("monospace",))
    large = LargeRequests()
    handlers = Handlers(models, on_response=large.remove)
    blocks = build_app(handlers)

    def is_possible(call: Any) -> bool:
        if not handlers.is_possible(call):
            return False
        return call["fn_index"] in blocks.fns and call.get("trigger_id") in (None, *blocks.blocks)

    page = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        theme=theme,
        css=static_text("page.css"),
        js=static_text("light.js"),
        footer_links=[],
        run_history=False,  # which would store pictures
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    application: Any = RequestLimits(page, is_possible, large, host)
    # Every open browser tab keeps a connection open; shutting down does not wait for them.
    return uvicorn.Server(
        uvicorn.Config(
            application, log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=MOST_CONNECTIONS
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens on a name or address of this machine; port 0 is any free one.

    Raises:
        UserError: if the address does not belong to this machine, or the port cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} is not an address of this machine: leave it out, or use 0.0.0.0 for all."
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(
            f"Cannot listen on port {port} of {host}: {reason_of(error)}. Choose another with --port."
        ) from error
    return listening


def build_app(handlers: Handlers) -> gr.Blocks:
    """Build the app with its first results: those of the first model, beside the second if there is one."""
    models = handlers.models
    names = list(models)
    start = handlers.start(names[0], names[1] if len(names) > 1 else ALONE)
    grid, last = models[start.model].grid, models[start.model].depth - 1
    with gr.Blocks(title=_TITLE, analytics_enabled=False) as page:
        gr.HTML(_INTRO, js_on_load=None)
        with gr.Row(elem_classes="steps painting"):
            with gr.Column(scale=2, min_width=300):
                _heading(*_PICTURE)
                picture = chooser(start.picture, handlers.examples)
                _heading(*_HIDE)
                mask = patch_grid("paint", handlers.displayed(start), grid, start.mask, elem_id="painter")
                with gr.Row(elem_classes="buttons later"):
                    another = gr.Button("Another mask", size="md", min_width=130)
                    clear = gr.Button("Show all", size="md", min_width=90)
                with gr.Group(elem_classes="later"):
                    ratio = gr.Slider(
                        LEAST_RATIO, MOST_RATIO, start.mask_ratio, step=0.05, label="Share to hide at random"
                    )
                    seed = gr.Number(start.seed, label="Seed of the random mask", precision=0)
            with gr.Column(scale=3, min_width=300):
                _heading(*_COMPLETED)
                with gr.Row(elem_classes="later"):
                    model = gr.Dropdown(names, value=start.model, label="Model", min_width=200)
                    beside = gr.Dropdown(
                        [ALONE, UNTRAINED, *names], value=start.beside, label="Compare with", min_width=200
                    )
                completed = gr.HTML(handlers.completed(*start), js_on_load=None, elem_id="completed")
        _heading(*_INSIDE)
        with gr.Row(elem_classes="steps"):
            with gr.Column(scale=2, min_width=260):
                layer = gr.Slider(0, last, start.layer, step=1, label="Layer of the encoder", interactive=last > 0)
                patch = patch_grid("pick", handlers.displayed(start), grid, start.patch, elem_id="picker")
            with gr.Column(scale=5, min_width=300):
                inside = gr.HTML(handlers.inside(*start), js_on_load=None, elem_id="inside")
        _heading(*_CHANGE)
        with gr.Row(elem_classes="steps"):
            with gr.Column(scale=2, min_width=260):
                atom = gr.Number(start.atom, label="Atom", precision=0)
                amount = gr.Slider(
                    -MOST_AMOUNT, MOST_AMOUNT, start.amount, step=1, label="Change, in standard deviations"
                )
            with gr.Column(scale=5, min_width=300):
                changed = gr.HTML(handlers.changed(*start), js_on_load=None, elem_id="changed")
        controls = Controls._make((picture, model, beside, mask, ratio, seed, layer, patch, atom, amount))

        for chosen, handler in ((picture.upload, handlers.upload), (picture.select, handlers.select)):
            displayed = _connect(chosen, handler, controls, [picture, mask, patch, completed])
            inspected = _connect(displayed.success, handlers.inside, controls, [inside])
            _connect(inspected.success, handlers.changed, controls, [changed])
        for choice in (model, beside):
            # One choice triggers `input` twice.
            outputs = [mask, patch, ratio, seed, layer, completed, inside, changed]
            _connect(choice.select, handlers.switch, controls, outputs)
        for masked in (
            _connect(ratio.change, handlers.random, controls, [mask, completed]),  # also by its reset button
            _connect(seed.input, handlers.random, controls, [mask, completed]),
            _connect(another.click, handlers.another, controls, [seed, mask, completed]),
            _connect(clear.click, handlers.clear, controls, [mask, completed]),
            _connect(mask.input, handlers.completed, controls, [completed]),
        ):
            _connect(masked.success, handlers.changed, controls, [changed])
        for moved in (layer.change, patch.input):
            _connect(moved, handlers.inside, controls, [inside])
        for turned in (layer.change, atom.input, amount.change):
            _connect(turned, handlers.changed, controls, [changed])
    return page.queue(max_size=_MAX_WAITING, api_open=False)


def _heading(title: str, text: str) -> None:
    gr.HTML(f'<div class="step"><h2>{title}</h2><p>{text}</p></div>', js_on_load=None)


def _connect(event: Any, handler: Any, controls: Controls, outputs: Sequence[Any]) -> Any:
    """Call a handler with all controls; while it runs, only the last of several further events is kept."""
    return event(
        refusing(handler),
        [*controls],
        [*outputs],
        preprocess=False,  # Gradio's own checks of ranges end in an error without a place
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=[each for each in outputs if each.elem_id in ("completed", "inside", "changed")],
        api_visibility="private",
    )


def static_text(name: str) -> str:
    """Read a script or style sheet of the app."""
    return (_STATIC / name).read_text(encoding="utf-8")


def chooser(picture: str, examples: Sequence[Example]) -> gr.HTML:
    """Build the component to drop a picture on or to click an example in; its value is the current picture.

    It triggers `upload` with the file's content as a data: URI, and `select` with the number of an example; both with
    the number of the visitor's attempt, which is returned with the message about it. Gradio's own component for images
    would write each picture to a file.
    """
    choices = [
        {"title": each.title, "credit": each.credit, "picture": to_uri(to_png(each.image.resize((64, 64))))}
        for each in examples
    ]
    return gr.HTML(
        picture,
        html_template=_CHOOSER,
        js_on_load=static_text("chooser.js"),
        elem_id="chooser",
        examples=choices,
        message=[0, ""],  # the attempt that it is about, and its text
        formats=", ".join(FORMATS),
        max_megabytes=MAX_BYTES // 2**20,
        max_bytes=MAX_BYTES,
        too_large=TOO_LARGE,
    )


def patch_grid(
    mode: Literal["paint", "pick"], picture: str, grid: tuple[int, int], value: str | int, **options: Any
) -> gr.HTML:
    """Build a picture on which patches are hidden with a brush, or one patch is picked; it triggers `input`.

    Args:
        mode: "paint", whose value is a mask as `compute.mask_text` writes it; or "pick", whose value is the number of
            a patch.
        picture: as a data: URI.
        grid: number of rows and columns of patches.
        value: of the component.
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
