"""Event handlers: from the values of the app's controls to the components that change.

Handlers keep no data of visitors. The picture travels with every request, as the value of its component, and is dropped
with the response, so that any number of visitors can use the app at once.
"""

from typing import Any, NamedTuple

import gradio as gr
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from crate_mae.app.components import displayed_picture, notice
from crate_mae.app.compute import layers, mask_from_text, mask_text, seeded_mask
from crate_mae.app.models import AppModel
from crate_mae.app.pictures import examples, from_uri, read_upload, to_png, to_uri
from crate_mae.app.responses import completion_response, inside_response
from crate_mae.errors import UserError

ALONE = "no other model"
UNTRAINED = "the same, untrained"
MASK_RATIO = 0.75
_NO_LIMIT = 2**30  # of a side: a browser sends back pictures that were scaled down before


class Controls(NamedTuple):
    """Values of the controls, in the order of the components.

    Attributes:
        picture: as a data: URI.
        model: its name.
        beside: the name of another model, `UNTRAINED` or `ALONE`.
        mask: as `compute.mask_text` writes it.
        mask_ratio: of random masks.
        seed: of random masks.
        layer: of the encoder, from 0.
        patch: number of the patch whose attention is shown.
    """

    picture: Any
    model: str
    beside: str
    mask: Any
    mask_ratio: float
    seed: float | None
    layer: float
    patch: Any


class Handlers:
    """The handler of each event.

    Args:
        models: the models to choose from, by name.

    Attributes:
        examples: pictures to start with.
    """

    def __init__(self, models: dict[str, AppModel]) -> None:
        self.models = models
        self.examples = examples()
        self._side = max(max(model.net.config.image_size) for model in models.values())

    def start(self, model: str, beside: str) -> Controls:
        """Return the controls when the app opens."""
        first = self.models[model]
        mask = mask_text(seeded_mask(first.net, MASK_RATIO, seed=0))
        rows, columns = first.grid
        centre = rows // 2 * columns + columns // 2
        return Controls(self._example(0), model, beside, mask, MASK_RATIO, 0, 0, centre)

    def upload(self, event: gr.EventData, *values: Any) -> list[Any]:
        """Use a visitor's file as the picture, or explain what is wrong with it."""
        try:
            image = read_upload(from_uri(_detail(event, "content")), self._side)
        except UserError as error:
            return [gr.HTML(message=[_detail(event, "attempt"), str(error)]), *[gr.skip()] * 4]
        return self._show(event, to_uri(to_png(image)), Controls(*values))

    def select(self, event: gr.EventData, *values: Any) -> list[Any]:
        """Use an example as the picture."""
        return self._show(event, self._example(_detail(event, "number")), Controls(*values))

    def switch(self, *values: Any) -> list[Any]:
        """Switch to another model: its grid, its layers and its results."""
        c = Controls(*values)
        first = self._chosen(c)[0]
        try:
            mask = mask_from_text(c.mask, first.grid)
        except UserError:  # the mask of another grid
            mask = self._random_mask(c)
        last = layers(first.net) - 1
        c = c._replace(layer=min(c.layer, last), patch=_patch_on(c.patch, first.grid), mask=mask_text(mask))
        slider = gr.Slider(maximum=last, value=c.layer, interactive=last > 0)
        return [*self._grids(c), slider, self.completed(*c), self.inside(*c)]

    def random(self, *values: Any) -> list[Any]:
        """Draw the mask of the chosen ratio and seed."""
        c = Controls(*values)
        try:
            c = c._replace(mask=mask_text(self._random_mask(c)))
        except UserError as error:
            return [gr.skip(), notice(str(error))]
        return [gr.HTML(c.mask), self.completed(*c)]

    def another(self, *values: Any) -> list[Any]:
        """Draw the mask of the next seed."""
        c = Controls(*values)
        c = c._replace(seed=int(c.seed or 0) + 1)
        return [c.seed, *self.random(*c)]

    def clear(self, *values: Any) -> list[Any]:
        """Hide nothing, to start a drawing."""
        c = Controls(*values)
        rows, columns = self._chosen(c)[0].grid
        c = c._replace(mask="0" * rows * columns)
        return [gr.HTML(c.mask), self.completed(*c)]

    def completed(self, *values: Any) -> str:
        """Complete the picture (step 3), or explain why not."""
        c = Controls(*values)
        models = self._chosen(c)
        try:
            return completion_response(_picture(c), models, mask_from_text(c.mask, models[0].grid))
        except UserError as error:
            return notice(str(error))

    def inside(self, *values: Any) -> str:
        """Show one layer, and the curves over all layers (step 4), or explain why not."""
        c = Controls(*values)
        models = self._chosen(c)
        try:
            return inside_response(_picture(c), models, int(c.layer), _patch_on(c.patch, models[0].grid))
        except UserError as error:
            return notice(str(error))

    def displayed(self, c: Controls) -> str:
        """Return the picture as the model sees it, for both grids."""
        return displayed_picture(self._chosen(c)[0].net, _picture(c))

    def _show(self, event: gr.EventData, picture: str, c: Controls) -> list[Any]:
        c, message = c._replace(picture=picture), [_detail(event, "attempt"), ""]
        return [gr.HTML(picture, message=message), *self._grids(c), self.completed(*c), self.inside(*c)]

    def _grids(self, c: Controls) -> list[Any]:
        """Update the grid to paint on, and the one to pick from."""
        rows, columns = self._chosen(c)[0].grid
        update = {"picture": self.displayed(c), "rows": rows, "columns": columns}
        return [gr.HTML(c.mask, **update), gr.HTML(c.patch, **update)]

    def _chosen(self, c: Controls) -> list[AppModel]:
        first = self.models[c.model]
        beside = first.untrained if c.beside == UNTRAINED else self.models.get(c.beside)
        return [first] if beside is None or beside is first else [first, beside]

    def _random_mask(self, c: Controls) -> Bool[Tensor, "gh gw"]:
        if c.seed is None or not 0 <= c.seed < 2**63:
            raise UserError("The seed must be a whole number, 0 or more.")
        return seeded_mask(self._chosen(c)[0].net, float(c.mask_ratio), int(c.seed))

    def _example(self, number: object) -> str:
        chosen = (
            self.examples[number] if isinstance(number, int) and 0 <= number < len(self.examples) else self.examples[0]
        )
        return to_uri(to_png(read_upload(to_png(chosen.image), self._side)))


def _detail(event: gr.EventData, name: str) -> object:
    """Return a value that came with an event; None if it is missing, which only a forged request can cause."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):
        return None


def _picture(c: Controls) -> Image.Image:
    """Decode the picture; it comes from a browser, so it is not trusted."""
    return read_upload(from_uri(c.picture), side=_NO_LIMIT)


def _patch_on(patch: Any, grid: tuple[int, int]) -> int:
    """Return the number of the picked patch; the last one if the grid is smaller."""
    count = grid[0] * grid[1]
    return min(max(int(patch), 0), count - 1) if str(patch).isdecimal() else count // 2
