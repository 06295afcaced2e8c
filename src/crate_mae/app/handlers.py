"""What happens when a visitor does something: from the state of the page's controls to what changes on it.

Nothing of a visitor's is kept here. The picture travels with every question, in the value of its component, and is gone
with the answer, so that any number of visitors can ask at once.
"""

from typing import Any, NamedTuple

import gradio as gr
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from crate_mae.app.answers import answer_completion, answer_inside
from crate_mae.app.compute import layers, mask_from_text, mask_text, seeded_mask
from crate_mae.app.examples import examples
from crate_mae.app.pieces import notice, shown_picture
from crate_mae.app.shown_models import ShownModel
from crate_mae.app.uploads import from_uri, read_upload, to_png, to_uri
from crate_mae.errors import UserError

ALONE = "no other model"
UNTRAINED = "the same, untrained"
MASK_RATIO = 0.75
_NO_LIMIT = 2**30  # of a side: what comes back from a browser was shrunk before


class Controls(NamedTuple):
    """What the visitor chose, in the order of the components.

    Attributes:
        picture: as an address that begins with "data:".
        model: its name.
        beside: the name of another, `UNTRAINED` or `ALONE`.
        mask: as `compute.mask_text` writes it.
        mask_ratio: of random masks.
        seed: of random masks.
        layer: of the encoder, from 0.
        patch: number of the one that looks.
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
    """The answers to what visitors do.

    Args:
        models: those that can be chosen, by name.

    Attributes:
        examples: pictures to begin with.
    """

    def __init__(self, models: dict[str, ShownModel]) -> None:
        self.models = models
        self.examples = examples()
        self._side = max(max(model.net.config.image_size) for model in models.values())

    def start(self, model: str, beside: str) -> Controls:
        """The first picture, answered before anybody has done anything."""
        shown = self.models[model]
        mask = mask_text(seeded_mask(shown.net, MASK_RATIO, seed=0))
        rows, columns = shown.grid
        centre = rows // 2 * columns + columns // 2
        return Controls(self._example(0), model, beside, mask, MASK_RATIO, 0, 0, centre)

    def upload(self, event: gr.EventData, *values: Any) -> list[Any]:
        """A file of the visitor's: all that shows the picture changes, or a sentence says why not."""
        try:
            image = read_upload(from_uri(_detail(event, "content")), self._side)
        except UserError as error:
            return [gr.HTML(message=[_detail(event, "attempt"), str(error)]), *[gr.skip()] * 4]
        return self._show(event, to_uri(to_png(image)), Controls(*values))

    def select(self, event: gr.EventData, *values: Any) -> list[Any]:
        """An example."""
        return self._show(event, self._example(_detail(event, "number")), Controls(*values))

    def switch(self, *values: Any) -> list[Any]:
        """Another model: its grid, its layers, and its answers."""
        c = Controls(*values)
        first = self._chosen(c)[0]
        try:
            mask = mask_from_text(c.mask, first.grid)
        except UserError:  # that of another grid
            mask = self._random_mask(c)
        last = layers(first.net) - 1
        c = c._replace(layer=min(c.layer, last), patch=_patch_on(c.patch, first.grid), mask=mask_text(mask))
        slider = gr.Slider(maximum=last, value=c.layer, interactive=last > 0)
        return [*self._grids(c), slider, self.completed(*c), self.inside(*c)]

    def random(self, *values: Any) -> list[Any]:
        """A mask of the chosen ratio and seed."""
        c = Controls(*values)
        try:
            c = c._replace(mask=mask_text(self._random_mask(c)))
        except UserError as error:
            return [gr.skip(), notice(str(error))]
        return [gr.HTML(c.mask), self.completed(*c)]

    def another(self, *values: Any) -> list[Any]:
        """The mask of the next seed."""
        c = Controls(*values)
        c = c._replace(seed=int(c.seed or 0) + 1)
        return [c.seed, *self.random(*c)]

    def clear(self, *values: Any) -> list[Any]:
        """A mask that hides nothing, to begin a drawing with."""
        c = Controls(*values)
        rows, columns = self._chosen(c)[0].grid
        c = c._replace(mask="0" * rows * columns)
        return [gr.HTML(c.mask), self.completed(*c)]

    def completed(self, *values: Any) -> str:
        """The third step: completions of the picture, or a sentence."""
        c = Controls(*values)
        models = self._chosen(c)
        try:
            return answer_completion(_picture(c), models, mask_from_text(c.mask, models[0].grid))
        except UserError as error:
            return notice(str(error))

    def inside(self, *values: Any) -> str:
        """The fourth step: one layer, and the curves over all, or a sentence."""
        c = Controls(*values)
        models = self._chosen(c)
        try:
            return answer_inside(_picture(c), models, int(c.layer), _patch_on(c.patch, models[0].grid))
        except UserError as error:
            return notice(str(error))

    def seen(self, c: Controls) -> str:
        """The picture as the model takes it, for both grids."""
        return shown_picture(self._chosen(c)[0].net, _picture(c))

    def _show(self, event: gr.EventData, picture: str, c: Controls) -> list[Any]:
        c, message = c._replace(picture=picture), [_detail(event, "attempt"), ""]
        return [gr.HTML(picture, message=message), *self._grids(c), self.completed(*c), self.inside(*c)]

    def _grids(self, c: Controls) -> list[Any]:
        """The grid to paint on, and the one to pick from."""
        rows, columns = self._chosen(c)[0].grid
        look = {"picture": self.seen(c), "rows": rows, "columns": columns}
        return [gr.HTML(c.mask, **look), gr.HTML(c.patch, **look)]

    def _chosen(self, c: Controls) -> list[ShownModel]:
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
    """What came with an event; None if it did not, which no page of ours does."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):
        return None


def _picture(c: Controls) -> Image.Image:
    """The picture, which comes back from a browser: anybody may have changed it."""
    return read_upload(from_uri(c.picture), side=_NO_LIMIT)


def _patch_on(patch: Any, grid: tuple[int, int]) -> int:
    """The number of the patch that was picked; of a smaller grid, the last."""
    count = grid[0] * grid[1]
    return min(max(int(patch), 0), count - 1) if str(patch).isdecimal() else count // 2
