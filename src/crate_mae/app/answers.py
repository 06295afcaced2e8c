"""What the page answers, as pieces of it: a function of picture, models, mask, layer and patch, and of nothing else."""

from collections.abc import Sequence
from html import escape

from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from crate_mae.app.compute import complete_picture, fit_mask, layers, look_inside, measure_curves
from crate_mae.app.pieces import completion_piece, curves_piece, inside_piece, notice
from crate_mae.app.shown_models import ShownModel
from crate_mae.errors import UserError

NORMALISED = (
    "What is predicted is the pattern of each patch. Brightness and contrast are the original's, so picture and PSNR "
    "are better than a model alone could make them. To be beaten are flat patches of that brightness."
)
RAW = "To be beaten are flat patches, of the mean colour of all that is visible."
FRESH = "Fresh, untrained weights: this is what a network knows that has never seen a picture."


def answer_completion(picture: Image.Image, models: Sequence[ShownModel], mask: Bool[Tensor, "gh gw"]) -> str:
    """The picture completed by each model, with what must be known about it.

    Args:
        picture: in mode RGB.
        models: those that are compared, or one.
        mask: on the grid of the first; others get the nearest on their own.
    """
    pieces = []
    for model in models:
        with model.turn:
            try:
                found = complete_picture(model.net, picture, fit_mask(mask, model.grid))
            except UserError as error:
                pieces.append(notice(str(error)))
                continue
        pieces.append(completion_piece(model.name, found))
    several = "" if len(models) > 1 else " alone"
    return f'<div class="completions{several}">{"".join(pieces)}</div>{_about(models)}'


def answer_inside(picture: Image.Image, models: Sequence[ShownModel], layer: int, patch: int) -> str:
    """What a layer of each model makes of the picture, and the curves over all layers.

    Args:
        picture: in mode RGB.
        models: those that are compared, or one.
        layer: from 0; of a model with fewer layers, the last.
        patch: number on the grid of the first; others get the one at the same place.
    """
    pieces, curves = [], []
    for model in models:
        count = layers(model.net)
        own = min(layer, count - 1)
        with model.turn:
            try:
                found = look_inside(model.net, picture, own, fit_patch(patch, models[0].grid, model.grid))
                curves.append((model.name, measure_curves(model.net, picture)))
            except UserError as error:
                pieces.append(notice(str(error)))
                continue
        pieces.append(inside_piece(model.name, own, count, found))
    return "".join(pieces) + (curves_piece(curves, layer) if curves else "")


def fit_patch(patch: int, grid: tuple[int, int], new_grid: tuple[int, int]) -> int:
    """The number of the patch of another grid that has a patch's centre."""
    row, column = (
        (2 * at + 1) * new // (2 * old) for at, old, new in zip(divmod(patch, grid[1]), grid, new_grid, strict=True)
    )
    return row * new_grid[1] + column


def _about(models: Sequence[ShownModel]) -> str:
    """What must be known of the models, each sentence once."""
    said: dict[str, list[str]] = {}
    for model in models:
        normalised = NORMALISED if model.net.config.norm_pix_loss else RAW
        for text in (_size(model), normalised, *([FRESH] if model.is_fresh else [])):
            said.setdefault(text, []).append(model.name)
    if len(models) == 1:
        return f'<p class="small">{escape(models[0].name)}: {" ".join(said)}</p>'
    return "".join(f'<p class="small">{escape(" and ".join(names))}: {text}</p>' for text, names in said.items())


def _size(model: ShownModel) -> str:
    c, millions = model.net.config, sum(each.numel() for each in model.net.parameters()) / 1e6
    height, width = c.image_size
    return (
        f"{width} x {height} pixels in patches of {c.patch_size} x {c.patch_size}; {layers(model.net)} layers of "
        f"encoder, {c.decoder_depth} of decoder; {millions:.2f} million parameters."
    )
