"""The page: where its parts stand, and which handler each of them calls."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from crate_mae.app.compute import layers
from crate_mae.app.handlers import ALONE, UNTRAINED, Controls, Handlers
from crate_mae.app.shown_models import ShownModel
from crate_mae.app.widgets import chooser, patch_grid

_MAX_WAITING = 64  # questions; whoever comes later is told to try again
_TITLE = "CRATE-MAE: hide most of a picture, and watch it be completed"
_INTRO = """<div class="intro"><h1>Hide most of a picture, and watch it be completed</h1>
<p>CRATE-MAE is a neural network in which every layer is derived to compress what it sees and to make it sparse. Paint
over parts of a picture, see what the network puts there, and look at what each of its layers did.</p></div>"""
_PICTURE = (
    "1. A picture",
    "It stays in this browser tab: the server has it in memory while it answers, and never on a disk.",
)
_HIDE = ("2. Hide patches", "Draw on it: a stroke hides, and one that begins on a hidden patch shows again.")
_COMPLETED = (
    "3. See it completed",
    "The number is the PSNR of the hidden patches alone, in decibels: more is closer to the original.",
)
_INSIDE = (
    "4. Look inside, layer by layer",
    "What the encoder makes of the whole picture, with nothing hidden. Each patch is a token; like tokens have like "
    "colours. Click a patch: the map of a head shows where it looks from there, from dark (nowhere) to yellow (the "
    "most on that map).",
)


def build_page(models: dict[str, ShownModel]) -> gr.Blocks:
    """The page of some models, with its first answers on it.

    Args:
        models: those that can be chosen, by name; the first is shown, next to the second if there is one.
    """
    handlers = Handlers(models)
    names = list(models)
    start = handlers.start(names[0], names[1] if len(names) > 1 else ALONE)
    grid, last = models[start.model].grid, layers(models[start.model].net) - 1
    with gr.Blocks(title=_TITLE, analytics_enabled=False) as page:
        gr.HTML(_INTRO, js_on_load=None)
        with gr.Row(elem_classes="steps"):
            with gr.Column(scale=2, min_width=300):
                _heading(*_PICTURE)
                picture = chooser(start.picture, handlers.examples)
                _heading(*_HIDE)
                mask = patch_grid("paint", handlers.seen(start), grid, start.mask, elem_id="painter")
                with gr.Row(elem_classes="buttons"):
                    another = gr.Button("Another mask", size="md", min_width=130)
                    clear = gr.Button("Show all", size="md", min_width=90)
                ratio = gr.Slider(0.05, 0.95, start.mask_ratio, step=0.05, label="Share to hide at random")
                seed = gr.Number(start.seed, label="Seed of the random mask", precision=0)
            with gr.Column(scale=3, min_width=300):
                _heading(*_COMPLETED)
                with gr.Row():
                    model = gr.Dropdown(names, value=start.model, label="Model", min_width=200)
                    beside = gr.Dropdown(
                        [ALONE, UNTRAINED, *names], value=start.beside, label="Compare with", min_width=200
                    )
                completed = gr.HTML(handlers.completed(*start), js_on_load=None, elem_id="completed")
        _heading(*_INSIDE)
        with gr.Row(elem_classes="steps"):
            with gr.Column(scale=2, min_width=260):
                layer = gr.Slider(0, last, start.layer, step=1, label="Layer of the encoder", interactive=last > 0)
                patch = patch_grid("pick", handlers.seen(start), grid, start.patch, elem_id="picker")
            with gr.Column(scale=5, min_width=300):
                inside = gr.HTML(handlers.inside(*start), js_on_load=None, elem_id="inside")
        controls = Controls._make((picture, model, beside, mask, ratio, seed, layer, patch))

        whole = [mask, patch, completed, inside]
        _connect(picture.upload, handlers.upload, controls, [picture, *whole])
        _connect(picture.select, handlers.select, controls, [picture, *whole])
        for choice in (model, beside):
            # `input` comes twice of one choice.
            _connect(choice.select, handlers.switch, controls, [mask, patch, layer, completed, inside])
        for number in (ratio, seed):
            _connect(number.input, handlers.random, controls, [mask, completed])
        _connect(another.click, handlers.another, controls, [seed, mask, completed])
        _connect(clear.click, handlers.clear, controls, [mask, completed])
        _connect(mask.input, handlers.completed, controls, [completed])
        for where in (layer, patch):
            _connect(where.input, handlers.inside, controls, [inside])
    return page.queue(max_size=_MAX_WAITING, api_open=False)


def _heading(title: str, text: str) -> None:
    gr.HTML(f'<div class="step"><h2>{title}</h2><p>{text}</p></div>', js_on_load=None)


def _connect(event: Any, handler: Any, controls: Controls, outputs: Sequence[Any]) -> None:
    """Ask with all controls; while an answer is on its way, of several more questions the last is asked."""
    event(
        handler,
        [*controls],
        [*outputs],
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=[each for each in outputs if each.elem_id in ("completed", "inside")],
        api_visibility="private",
    )
