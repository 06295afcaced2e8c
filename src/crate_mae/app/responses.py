"""Responses of the app as HTML: functions of picture, models, mask, layer and patch alone."""

from collections.abc import Sequence
from html import escape

from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from crate_mae.app.components import completion_component, curves_component, inside_component, notice
from crate_mae.app.compute import complete_picture, fit_mask, layers, look_inside, measure_curves
from crate_mae.app.models import AppModel
from crate_mae.errors import UserError

NORMALISED = (
    "The model predicts the pattern of each patch. Brightness and contrast are the original's, so picture and PSNR are "
    "better than the model alone could make them. The baseline is flat patches of that brightness."
)
RAW = "The baseline is flat patches of the mean colour of all that is visible."
RANDOM = "Random initialisation: this network has not been trained."


def completion_response(picture: Image.Image, models: Sequence[AppModel], mask: Bool[Tensor, "gh gw"]) -> str:
    """Complete the picture by each model, with notes on how to read the result.

    Args:
        picture: in mode RGB.
        models: the models to compare, or one.
        mask: on the grid of the first model; fitted to the grids of the others.
    """
    parts = []
    for model in models:
        with model.lock:
            try:
                found = complete_picture(model.net, picture, fit_mask(mask, model.grid))
            except UserError as error:
                parts.append(notice(str(error)))
                continue
        parts.append(completion_component(model.name, found))
    several = "" if len(models) > 1 else " alone"
    return f'<div class="completions{several}">{"".join(parts)}</div>{_about(models)}'


def inside_response(picture: Image.Image, models: Sequence[AppModel], layer: int, patch: int) -> str:
    """Show tokens and attention of one layer of each model, and the curves over all layers.

    Args:
        picture: in mode RGB.
        models: the models to compare, or one.
        layer: from 0; models with fewer layers show their last.
        patch: number on the grid of the first model; the others use the patch at the same place.
    """
    parts, curves = [], []
    for model in models:
        count = layers(model.net)
        own = min(layer, count - 1)
        with model.lock:
            try:
                found = look_inside(model.net, picture, own, fit_patch(patch, models[0].grid, model.grid))
                curves.append((model.name, measure_curves(model.net, picture)))
            except UserError as error:
                parts.append(notice(str(error)))
                continue
        parts.append(inside_component(model.name, own, count, found))
    return "".join(parts) + (curves_component(curves, layer) if curves else "")


def fit_patch(patch: int, grid: tuple[int, int], new_grid: tuple[int, int]) -> int:
    """Return the number of the patch of another grid that contains the centre of a patch."""
    row, column = (
        (2 * at + 1) * new // (2 * old) for at, old, new in zip(divmod(patch, grid[1]), grid, new_grid, strict=True)
    )
    return row * new_grid[1] + column


def _about(models: Sequence[AppModel]) -> str:
    """Describe the models, each sentence once."""
    names_of: dict[str, list[str]] = {}
    for model in models:
        normalised = NORMALISED if model.net.config.norm_pix_loss else RAW
        for text in (_size(model), normalised, *([RANDOM] if model.is_random else [])):
            names_of.setdefault(text, []).append(model.name)
    if len(models) == 1:
        return f'<p class="small">{escape(models[0].name)}: {" ".join(names_of)}</p>'
    return "".join(f'<p class="small">{escape(" and ".join(names))}: {text}</p>' for text, names in names_of.items())


def _size(model: AppModel) -> str:
    c, millions = model.net.config, sum(each.numel() for each in model.net.parameters()) / 1e6
    height, width = c.image_size
    return (
        f"{width} x {height} pixels in patches of {c.patch_size} x {c.patch_size}; {layers(model.net)} layers of "
        f"encoder, {c.decoder_depth} of decoder; {millions:.2f} million parameters."
    )
