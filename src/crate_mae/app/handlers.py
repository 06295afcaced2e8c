"""Event handlers: from the values of the app's controls to the components that change.

Handlers keep no data of visitors. The picture travels with every request, as the value of its component, and is dropped
with the response, so that any number of visitors can use the app at once.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from crate_mae.app.compute import AppModel, codes_of, mask_from_text, mask_text, seeded_mask, varied_atoms
from crate_mae.app.limits import CANNOT_PROCESS, without_pictures
from crate_mae.app.pictures import examples, from_uri, read_upload, to_png, to_uri
from crate_mae.app.responses import atom_response, completion_response, displayed_picture, inside_response, notice
from crate_mae.data.numbers import is_number
from crate_mae.errors import UserError
from crate_mae.models.config import MASK_RATIO

logger = logging.getLogger(__name__)

ALONE = "no other model"
UNTRAINED = "the same model, random initialisation"
LEAST_RATIO, MOST_RATIO = 0.05, 0.95
MOST_AMOUNT = 20.0  # by which an atom is changed, in standard deviations
_FIRST_AMOUNT = 10.0
_LONGEST_SESSION = 64
_MOST_EVENTS = 1000
_MOST_SEED = 2**53 - 1  # the largest whole number that every browser writes exactly
_NO_LIMIT = 2**30  # of a side: a browser sends back pictures that were scaled down before


class Controls(NamedTuple):
    """Values of the controls, in the order of the components.

    Numbers may be out of range, and are None if their box is empty.
    """

    picture: Any  # as a data: URI
    model: str  # its name
    beside: str  # the name of another model, `UNTRAINED` or `ALONE`
    mask: Any  # as `compute.mask_text` writes it
    mask_ratio: Any  # of random masks
    seed: Any  # of random masks
    layer: Any  # of the encoder, from 0
    patch: Any  # number of the patch whose attention is shown
    atom: Any  # number of the atom that is changed
    amount: Any  # by how much, in standard deviations


def _explaining(handler: Callable[..., str]) -> Callable[..., str]:
    """Wrap a method of `Handlers`: what the visitor can put right is explained in place of the result."""

    @functools.wraps(handler)
    def handle(*arguments: Any) -> str:
        try:
            return handler(*arguments)
        except UserError as error:
            return notice(str(error))

    return handle


class Handlers:
    """The handler of each event.

    Args:
        models: the models to choose from, by name.
        on_response: is called when an upload has its response.

    Attributes:
        models: as given.
        examples: pictures to start with.
    """

    def __init__(self, models: dict[str, AppModel], on_response: Callable[[], object]) -> None:
        self.models = models
        self._on_response = on_response
        self.examples = examples()
        self._side = max(max(model.net.config.image_size) for model in models.values())

    def start(self, model: str, beside: str) -> Controls:
        """Return the controls when the app opens."""
        first = self.models[model]
        mask = mask_text(seeded_mask(first.net, MASK_RATIO, seed=0))
        rows, columns = first.grid
        centre = rows // 2 * columns + columns // 2
        # Attention of the bundled model's last layer lowers R^c the most, by 38%, and is mostly on other patches in
        # seven of eight heads.
        picture, last = self._example(0), first.depth - 1
        try:
            atom = varied_atoms(codes_of(first.net, read_upload(from_uri(picture), self._side), last))[0]
        except UserError:  # a model without codes
            atom = 0
        return Controls(picture, model, beside, mask, MASK_RATIO, 0, last, centre, atom, _FIRST_AMOUNT)

    def upload(self, event: gr.EventData, *values: Any) -> list[Any]:
        """Use a visitor's file as the picture, or explain what is wrong with it."""
        try:
            image = read_upload(from_uri(_detail(event, "content")), self._side)
            return self._show(event, to_uri(to_png(image)), Controls(*values))
        except UserError as error:
            return [gr.HTML(message=[_detail(event, "attempt"), str(error)]), *[gr.skip()] * 3]
        finally:
            self._on_response()

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
            if self._wrong_number(c):
                c = c._replace(mask_ratio=MASK_RATIO, seed=0)
            mask = self._random_mask(c)
        last = first.depth - 1
        c = c._replace(
            layer=int(min(max(c.layer or 0, 0), last)), patch=_patch_on(c.patch, first.grid), mask=mask_text(mask)
        )
        slider = gr.Slider(maximum=last, value=c.layer, interactive=last > 0)
        return [*self._grids(c), c.mask_ratio, c.seed, slider, self.completed(*c), self.inside(*c), self.changed(*c)]

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
        seed = c.seed if is_number(c.seed, 0, _MOST_SEED - 1) else -1
        c = c._replace(seed=int(seed) + 1)
        return [c.seed, *self.random(*c)]

    def clear(self, *values: Any) -> list[Any]:
        """Hide nothing, to start a drawing."""
        c = Controls(*values)
        rows, columns = self._chosen(c)[0].grid
        c = c._replace(mask="0" * rows * columns)
        return [gr.HTML(c.mask), self.completed(*c)]

    @_explaining
    def completed(self, *values: Any) -> str:
        """Complete the picture (step 3), or explain why not."""
        c = Controls(*values)
        models = self._chosen(c)
        return completion_response(_picture(c), models, mask_from_text(c.mask, models[0].grid))

    @_explaining
    def inside(self, *values: Any) -> str:
        """Show one layer, and the curves over all layers (step 4), or explain why not."""
        c = Controls(*values)
        models = self._chosen(c)
        return inside_response(_picture(c), models, _layer(c, models), _patch_on(c.patch, models[0].grid))

    @_explaining
    def changed(self, *values: Any) -> str:
        """Change an atom of the layer and complete the picture (step 5), or explain why not."""
        c = Controls(*values)
        models = self._chosen(c)
        layer, mask = _layer(c, models), mask_from_text(c.mask, models[0].grid)
        if not is_number(c.atom, 0, _MOST_SEED) or c.atom != int(c.atom):
            raise UserError("The atom must be a whole number, at least 0.")
        if not is_number(c.amount, -MOST_AMOUNT, MOST_AMOUNT):
            raise UserError(f"The change must be from {-MOST_AMOUNT:g} to {MOST_AMOUNT:g} standard deviations.")
        return atom_response(_picture(c), models, mask, layer, int(c.atom), float(c.amount))

    def displayed(self, c: Controls) -> str:
        """Return the picture as the model sees it, for both grids."""
        return displayed_picture(self._chosen(c)[0].net, _picture(c))

    def is_possible(self, call: Any) -> bool:
        """Whether the app's script could have made a call to Gradio."""
        if not isinstance(call, dict) or not isinstance(call.get("data"), list):
            return False
        session, values = call.get("session_hash"), call["data"]
        return (
            isinstance(session, str)
            and 0 < len(session) <= _LONGEST_SESSION
            and session.isprintable()
            and is_number(call.get("fn_index"), 0, _MOST_EVENTS)
            and (call.get("trigger_id") is None or is_number(call["trigger_id"], 0, 10**6))
            and not call.get("batched")
            and len(values) == len(Controls._fields)
            and self._are_possible(Controls(*values))
        )

    def _are_possible(self, c: Controls) -> bool:
        return (
            isinstance(c.picture, str | None)
            and c.model in tuple(self.models)  # a forged value may have no hash
            and c.beside in (ALONE, UNTRAINED, *self.models)
            and isinstance(c.mask, str | None)
            and all(
                each is None or is_number(each, -math.inf, math.inf)
                for each in (c.mask_ratio, c.seed, c.layer, c.atom, c.amount)
            )
            and isinstance(c.patch, str | int | None)
        )

    def _show(self, event: gr.EventData, picture: str, c: Controls) -> list[Any]:
        c, message = c._replace(picture=picture), [_detail(event, "attempt"), ""]
        return [gr.HTML(picture, message=message), *self._grids(c), self.completed(*c)]

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
        if mistake := self._wrong_number(c):
            raise UserError(mistake)
        return seeded_mask(self._chosen(c)[0].net, float(c.mask_ratio), int(c.seed))

    @staticmethod
    def _wrong_number(c: Controls) -> str | None:
        """Describe what is wrong with the numbers of a random mask; None if nothing is."""
        if not is_number(c.mask_ratio, LEAST_RATIO - 1e-9, MOST_RATIO + 1e-9):
            return f"The share to hide must be from {LEAST_RATIO} to {MOST_RATIO}."
        if not is_number(c.seed, 0, _MOST_SEED) or c.seed != int(c.seed):
            return f"The seed must be a whole number from 0 to {_MOST_SEED:,}."
        return None

    def _example(self, number: object) -> str:
        known = number if isinstance(number, int) and 0 <= number < len(self.examples) else 0
        return to_uri(to_png(read_upload(to_png(self.examples[known].image), self._side)))


def refusing(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler: the visitor gets a message if it fails, and the log a line."""

    @functools.wraps(handler)
    def handle(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except Exception as error:  # values that only a forged request can have, or a fault of ours
            logger.warning("A request failed: %s", without_pictures(error))
            raise gr.Error(CANNOT_PROCESS, print_exception=False) from None

    return handle


def _detail(event: gr.EventData, name: str) -> object:
    """Return a value that came with an event; None if it is missing, which only a forged request can cause."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):
        return None


def _picture(c: Controls) -> Image.Image:
    """Decode the picture; it comes from a browser, so it is not trusted."""
    return read_upload(from_uri(c.picture), side=_NO_LIMIT)


def _layer(c: Controls, models: Sequence[AppModel]) -> int:
    """Return the number of the chosen layer."""
    last = max(model.depth for model in models) - 1
    if not is_number(c.layer, 0, last) or c.layer != int(c.layer):
        raise UserError(f"The layer must be a whole number from 0 to {last}.")
    return int(c.layer)


def _patch_on(patch: Any, grid: tuple[int, int]) -> int:
    """Return the number of the picked patch; the last one if the grid is smaller."""
    count = grid[0] * grid[1]
    return min(max(int(patch), 0), count - 1) if str(patch).isdecimal() else count // 2
