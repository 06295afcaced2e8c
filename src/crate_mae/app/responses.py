"""Responses of the app as HTML, which contains its pictures, so that no file is ever written."""

import re
from collections.abc import Callable, Sequence
from html import escape
from urllib.parse import quote

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from crate_mae.app.compute import (
    AppModel,
    ChangedAtom,
    Completed,
    Curves,
    Inside,
    change_atom,
    complete_picture,
    fit_mask,
    fit_patch,
    look_inside,
    measure_curves,
    prepare,
)
from crate_mae.app.curves import ChartLine, draw_curves
from crate_mae.app.pictures import to_png, to_uri
from crate_mae.data.pictures import picture_grid
from crate_mae.drawing.measures import MEASURES
from crate_mae.drawing.style import GREY, HEAT, colour
from crate_mae.drawing.text import html, raised
from crate_mae.errors import UserError
from crate_mae.interpret.audit import LEAST_MARGIN_SHARE, SYMBOLS, AuditRow, by_claim
from crate_mae.interpret.tokens import to_pictures
from crate_mae.models.autoencoder import MaskedAutoencoder

_NOTES = {
    "original": "",
    "masked": "what the model sees",
    "completed": "hidden patches filled in",
    "prediction": "of hidden patches only",
}
_CURVES = (
    "The chosen layer is marked in yellow. The first half of a layer should compress, that is, lower the subspace rate "
    "Rᶜ: from the hollow point to the filled point. The second half makes the code sparse by setting exact zeros; its "
    "effect on the rate is the change from the filled point to the hollow point of the next layer."
)
_AUDIT = (
    "∎: a theorem of the layer, true for every image. ✓: the step beats its best control; the margin is in percent of "
    "the value before the step. ✗: the named control is as good or better. A control is a step that needs no "
    "derivation, such as the same step with its sign flipped, without mixing tokens, or in random subspaces. A single "
    "image is no evidence: use crate-mae inspect to test many."
)
_SEVERAL = " Values of Rᶜ are comparable only between networks of the same shape."
_NORMALISED = (
    "The model predicts the pattern of each patch. Brightness and contrast come from the original, so image and PSNR "
    "are better than the model alone could achieve. The baseline is flat patches with the same brightness."
)
_RAW = "The baseline is flat patches with the mean colour of the visible patches."
_RANDOM = "Random initialisation: this network has not been trained."


def completion_response(picture: Image.Image, models: Sequence[AppModel], mask: Bool[Tensor, "gh gw"]) -> str:
    """Complete an RGB picture by each model, with notes on how to read the result; `mask` has the first one's grid."""

    def completed(model: AppModel) -> str:
        return completion_component(model.name, complete_picture(model.net, picture, fit_mask(mask, model.grid)))

    several = "" if len(models) > 1 else " alone"
    return f'<div class="completions{several}">{_for_each(models, completed)}</div>{_about(models)}'


def inside_response(picture: Image.Image, models: Sequence[AppModel], layer: int, patch: int) -> str:
    """Show tokens and attention of one layer of each model for an RGB picture, and the curves over all layers.

    A model with fewer layers shows its last. `patch` is a number on the grid of the first model; the others use the
    patch at the same place.
    """
    curves = []

    def inside(model: AppModel) -> str:
        own = min(layer, model.depth - 1)
        found = look_inside(model.net, picture, own, fit_patch(patch, models[0].grid, model.grid))
        curves.append((model.name, measure_curves(model.net, picture)))
        return inside_component(model.name, own, model.depth, found)

    return _for_each(models, inside) + (curves_component(curves, layer) if curves else "")


def atom_response(
    picture: Image.Image,
    models: Sequence[AppModel],
    mask: Bool[Tensor, "gh gw"],
    layer: int,
    atom: int,
    amount: float,
) -> str:
    """Complete an RGB picture by each model with one atom of a layer's code raised or lowered.

    `mask` has the first model's grid; a model with fewer layers changes its last.
    """

    def changed(model: AppModel) -> str:
        own = min(layer, model.depth - 1)
        found = change_atom(model.net, picture, fit_mask(mask, model.grid), own, atom, amount)
        return atom_component(model.name, own, atom, amount, found)

    return _for_each(models, changed)


def _for_each(models: Sequence[AppModel], respond: Callable[[AppModel], str]) -> str:
    """Respond with each model while it is locked, or explain why not."""
    parts = []
    for model in models:
        with model.lock:
            try:
                parts.append(respond(model))
            except UserError as error:
                parts.append(notice(str(error)))
    return "".join(parts)


def displayed_picture(model: MaskedAutoencoder, picture: Image.Image) -> str:
    """Return the part of a picture that a model sees, in the model's size, as a data: URI."""
    c = model.config
    return _to_uri(to_pictures(prepare(model, picture), c.mean, c.std)[0])


def completion_component(name: str, found: Completed) -> str:
    """Show the original, masked, completed and predicted picture, with links to save each of them, or all in one."""
    stem, pictures = file_stem(name), found.pictures._asdict()
    tiles = [
        _tile(_to_uri(_pixels(pictures[title][0])), title, note, save_as=f"{stem}_{title}.png")
        for title, note in _NOTES.items()
    ]
    grid = picture_grid([(title, pictures[title]) for title in _NOTES], captions=[f"{found.psnr:.1f} dB"])
    return (
        f'<div class="completion"><p class="verdict">{_verdict(found)}</p>'
        f'<p class="result"><strong>{escape(name)}</strong> <span class="score">{found.psnr:.1f} dB</span> '
        f"<span>flat patches: {found.flat_psnr:.1f} dB</span> "
        f"{_save(to_uri(grid), f'{stem}.png', 'save all four pictures')}</p>"
        f'<div class="tiles four">{"".join(tiles)}</div></div>'
    )


def inside_component(name: str, layer: int, layers: int, found: Inside) -> str:
    """Show tokens as colours, and the attention of one patch, head by head, with a link to save them as one picture."""
    grid = (found.colours.shape[0], found.colours.shape[1])
    row, column = divmod(found.patch, grid[1])
    tokens = _tile(_to_uri(found.colours), "tokens", f"three components: {found.explained:.0%} of the variance")
    maps = [_heat(each) for each in found.heads]
    heads = [
        _tile(
            _to_uri(each),
            f"head {number}",
            f"up to {share(float(found.heads[number].max()))}",
            mark=_mark(row, column, grid),
        )
        for number, each in enumerate(maps)
    ]
    rows = [("tokens", _images([found.colours])), ("heads", _images(maps))]
    picture = to_uri(picture_grid(rows, captions=[f"head {number}" for number in range(len(maps))]))
    return (
        f'<p class="result"><strong>{escape(name)}</strong> <span>layer {layer} of 0 to {layers - 1}</span> '
        f"{_save(picture, f'{file_stem(name)}_layer_{layer}.png', 'save these maps')}</p>"
        f'<div class="inside"><div class="tiles one">{tokens}</div>'
        f'<div class="tiles heads">{"".join(heads)}</div></div>'
        f'<p class="small">Attention is that of the framed patch: row {row + 1}, column {column + 1}. Uniform '
        f"attention would give each patch {share(found.even)}.</p>"
    )


def atom_component(name: str, layer: int, atom: int, amount: float, found: ChangedAtom) -> str:
    """Show where an atom is active, and the completion before and after it is changed."""
    difference = _pixels(found.changed) - _pixels(found.completed)
    largest = float(np.abs(difference).max())
    scaled = 0.5 + difference / (2 * largest) if largest > 0 else np.full_like(difference, 0.5)
    stem = f"{file_stem(name)}_layer_{layer}_atom_{atom}"
    pictures = (
        (_heat(found.active), "activation", f"in the whole picture, up to {float(found.active.max()):.2f}"),
        (_pixels(found.completed), "completed", "as it is"),
        (_pixels(found.changed), "changed", f"atom {atom} by {amount:+g} standard deviations"),
        (scaled, "difference", f"grey is none; scaled to its maximum, {share(largest)} of the range of pixels"),
    )
    tiles = [_tile(_to_uri(each), title, note, save_as=f"{stem}_{title}.png") for each, title, note in pictures]
    varied = ", ".join(map(str, found.varied))
    return (
        f'<div class="completion"><p class="result"><strong>{escape(name)}</strong> '
        f"<span>layer {layer}, atom {atom} of 0 to {found.atoms - 1}</span> "
        f"<span>hidden pixels change by {share(found.size)} of their range (root mean square)</span></p>"
        f'<div class="tiles four">{"".join(tiles)}</div>'
        f'<p class="small">In this picture, these atoms of the layer vary most from patch to patch: {varied}.</p></div>'
    )


def curves_component(curves: Sequence[tuple[str, Curves]], layer: int) -> str:
    """Draw subspace rate and sparsity over the layers of each model, by its name, with the current layer marked."""
    drawn = [(name, found) for name, found in curves if found.zeros]
    missing = "".join(
        f"<p>{escape(name)} has neither subspaces nor codes: only the layers of CRATE have these curves.</p>"
        for name, found in curves
        if not found.zeros
    )
    if not drawn:
        return missing
    sentences = "".join(f"<li>{escape(name)}: {_in_words(found, layer)}</li>" for name, found in drawn)
    audits = "".join(_audit(name, found.audit) for name, found in drawn if found.audit)
    return (
        f'<div class="curves">{_figure(_draw_rates(drawn, layer), "subspace_rate.svg")}'
        f'{_figure(_draw_zeros(drawn, layer), "zeros.svg")}</div><ul class="summary">{sentences}</ul>'
        f'<p class="small">{_CURVES}{_SEVERAL if len(drawn) > 1 else ""}</p>{audits}{missing}'
    )


def notice(sentence: str) -> str:
    """Show what went wrong in place of the result."""
    return f'<p class="notice" role="alert">{escape(sentence)}</p>'


def file_stem(name: str) -> str:
    """Turn the name of a model into a file name without suffix."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "model"


def share(value: float) -> str:
    """Format a share as a percentage with two digits."""
    percent = 100 * value
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"


def _about(models: Sequence[AppModel]) -> str:
    """Describe the models, each sentence once."""
    names_of: dict[str, list[str]] = {}
    for model in models:
        normalised = _NORMALISED if model.net.config.norm_pix_loss else _RAW
        for text in (_size(model), normalised, *([_RANDOM] if model.is_random else [])):
            names_of.setdefault(text, []).append(model.name)
    if len(models) == 1:
        return f'<p class="small">{escape(models[0].name)}: {" ".join(names_of)}</p>'
    return "".join(f'<p class="small">{escape(" and ".join(names))}: {text}</p>' for text, names in names_of.items())


def _size(model: AppModel) -> str:
    c, millions = model.net.config, sum(each.numel() for each in model.net.parameters()) / 1e6
    height, width = c.image_size
    return (
        f"{width} x {height} pixels in patches of {c.patch_size} x {c.patch_size}; {model.depth} layers of "
        f"encoder, {c.decoder_depth} of decoder; {millions:.2f} million parameters."
    )


def _verdict(found: Completed) -> str:
    """Compare the completion with flat patches in one sentence."""
    hidden, patches = found.hidden
    error = 10 ** ((found.flat_psnr - found.psnr) / 10)
    if abs(1 - error) < 0.005:
        compared = "as large as"
    else:
        compared = f"{share(abs(1 - error))} {'smaller' if error < 1 else 'larger'} than"
    return (
        f"{hidden} of {patches} patches were hidden. The squared error of the completion is {compared} that of flat "
        "patches."
    )


def _tile(uri: str, title: str, note: str = "", *, save_as: str = "", mark: str = "") -> str:
    save = f" {_save(uri, save_as, 'save', f'save the {title} picture')}" if save_as else ""
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure><div class="framed"><img src="{uri}" alt="{escape(title)}">{mark}</div>'
        f"<figcaption>{escape(title)}{save}{small}</figcaption></figure>"
    )


def _save(uri: str, file: str, words: str, label: str = "") -> str:
    """Link to a file to save; `label` says what it is where the words do so only for those who see the picture."""
    title = f"{label or words}, as {file}"
    return (
        f'<a class="save" href="{uri}" download="{escape(file)}" title="{escape(title)}" '
        f'aria-label="{escape(title)}">{words}</a>'
    )


def _figure(svg: str, file: str) -> str:
    uri = f"data:image/svg+xml,{quote(svg)}"
    return f"<figure>{svg}<figcaption>{_save(uri, file, 'save this chart')}</figcaption></figure>"


def _mark(row: int, column: int, grid: tuple[int, int]) -> str:
    """Draw a frame around one patch of a picture."""
    places = {"left": column / grid[1], "top": row / grid[0], "width": 1 / grid[1], "height": 1 / grid[0]}
    return f'<i style="{";".join(f"{key}:{100 * value:.3f}%" for key, value in places.items())}"></i>'


def _to_uri(pixels: Float[np.ndarray, "hh ww 3"]) -> str:
    levels = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    return to_uri(to_png(Image.fromarray(np.ascontiguousarray(levels))))


def _pixels(image: Float[Tensor, "c hh ww"]) -> Float[np.ndarray, "hh ww 3"]:
    """Convert to RGB, also from one channel."""
    return image.float().expand(3, -1, -1).permute(1, 2, 0).numpy()


def _images(pixels: Sequence[Float[np.ndarray, "hh ww 3"]]) -> Float[Tensor, "k 3 hh ww"]:
    return torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)


def _heat(values: Float[np.ndarray, "gh gw"]) -> Float[np.ndarray, "gh gw 3"]:
    """Colour a map from dark (0) to bright (its own maximum)."""
    largest = values.max()
    return matplotlib.colormaps[HEAT](values / largest if largest > 0 else values)[..., :3]


def _in_words(found: Curves, layer: int) -> str:
    """Describe what the current layer did, or the last layer if there are fewer."""
    at = min(layer, len(found.zeros) - 1)
    before, after = found.rate_before[at], found.rate_after[at]
    verb = "lowers" if after < before else "raises"
    rates = f"Rᶜ from {before:.0f} to {after:.0f} nats"
    return f"in layer {at}, attention {verb} {rates}; {found.zeros[at]:.0%} of the code is 0."


def _audit(name: str, rows: Sequence[AuditRow]) -> str:
    """Tabulate each claim of each layer: whether it is a theorem, or the step beats all of its controls."""
    claims = by_claim(rows)
    count = max(len(found) for found in claims.values())
    header = "".join(f"<th>{layer}</th>" for layer in range(count))
    lines = "".join(
        f"<tr><th>{html(found[0].text)}</th>{''.join(f'<td>{_status(row)}</td>' for row in found)}</tr>"
        for found in claims.values()
    )
    return (
        f'<details class="audit" open><summary>{escape(name)}: steps and their controls, on this picture</summary>'
        f"<div><table><tr><th>layer</th>{header}</tr>{lines}</table></div>"
        f'<p class="small">{_AUDIT}</p></details>'
    )


def _status(row: AuditRow) -> str:
    """Describe the margin over the best control; one picture allows no statistical test."""
    is_better = row.margin_share >= LEAST_MARGIN_SHARE
    compared = f"{share(row.margin_share)} better" if is_better else "no better"
    compared += f" than {escape(row.closest_control)}"
    if row.status in ("theorem", "contradiction"):
        return f"{SYMBOLS[row.status]} {row.status}; {compared}"
    return f"{SYMBOLS['holds' if is_better else 'does not hold']} {compared}"


def _draw_rates(curves: Sequence[tuple[str, Curves]], layer: int) -> str:
    """Draw Rᶜ before and after each layer's compression."""
    lines, keys = [], []
    for number, (name, found) in enumerate(curves):
        style = {"colour": colour(number), "square": number > 0}
        lines += [
            ChartLine(found.rate_before, tip=f"nats before compression ({name})", dotted=True, **style),
            ChartLine(found.rate_after, tip=f"nats after it ({name})", **style),
        ]
        keys.append((name, lines[-1]))
    keys += [
        ("hollow: before the layer's compression", ChartLine([], GREY, "", dotted=True)),
        ("filled: after it", ChartLine([], GREY, "")),
    ]
    return draw_curves(raised(MEASURES["subspace_rate_normalised"].label), lines, keys, layer)


def _draw_zeros(curves: Sequence[tuple[str, Curves]], layer: int) -> str:
    """Draw the sparsity of each layer's code."""
    lines = [
        ChartLine(found.zeros, colour(number), f"of the code is 0 ({name})", square=number > 0)
        for number, (name, found) in enumerate(curves)
    ]
    keys = [(name, line) for (name, _), line in zip(curves, lines, strict=True)]
    return draw_curves(raised(MEASURES["zero_fraction"].label), lines, keys, layer, top=1.0)
