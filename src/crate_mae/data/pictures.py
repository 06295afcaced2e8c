"""Rows of images as one picture."""

import io
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crate_mae.data.decode import to_8_bits
from crate_mae.data.files import write_whole
from crate_mae.errors import UserError, first_line

_TILE = 128
_GAP = 4
_MARGIN = 12
_FONT_SIZE = 16
_CAPTION_HEIGHT = 24


def save_picture_grid(
    rows: Sequence[tuple[str, Float[Tensor, "_ _ _ _"]]],
    path: Path,
    *,
    captions: Sequence[str] | None = None,
) -> None:
    """Save the `picture_grid` of named rows of images as a file, completely or not at all.

    The suffix of the path decides the format, mostly `.png`. Missing folders are created.

    Raises:
        UserError: if the file cannot be written, or its suffix is not that of a picture format.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise UserError(f'Cannot write pictures as "{path.suffix}" ({path}): use .png.')
    try:
        content = picture_grid(rows, form, captions=captions)
    except (OSError, ValueError) as error:  # a format that is not for colours, or not for pictures of this size
        raise UserError(f"Cannot write {path}: {first_line(error)}. Use .png.") from error
    write_whole(path, content)


def picture_grid(
    rows: Sequence[tuple[str, Float[Tensor, "_ _ _ _"]]],
    form: str = "PNG",
    *,
    captions: Sequence[str] | None = None,
) -> bytes:
    """Draw named rows of images as one picture, and encode it as a file.

    Small images are enlarged without smoothing, to about 128 pixels.

    Args:
        rows: name, drawn at the left, and images k c hh ww in [0, 1] (clamped); all of one height and width. One
            channel is grey, three are colour; for other numbers the mean is drawn.
        form: Pillow's name of the format.
        captions: one line under each column.
    """
    sizes = {tuple(images.shape[2:]) for _, images in rows}
    assert len(sizes) == 1, "a grid has images of one size"
    height, width = sizes.pop()
    scale = max(1, round(_TILE / max(height, width)))
    tiles = [(name, [_tile(image, scale) for image in images]) for name, images in rows]
    with io.BytesIO() as buffer:
        _draw(tiles, (width * scale, height * scale), captions or ()).save(buffer, format=form)
        return buffer.getvalue()


def _draw(rows: Sequence[tuple[str, list[Image.Image]]], tile: tuple[int, int], captions: Sequence[str]) -> Image.Image:
    """Lay out tiles of one (width, height): names to the left, captions below."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    left = _MARGIN + max((int(font.getlength(name)) + _MARGIN for name, _ in rows if name), default=0)
    step_right, step_down = tile[0] + _GAP, tile[1] + _GAP
    columns = max(len(images) for _, images in rows)
    width = left + columns * step_right - _GAP + _MARGIN
    height = 2 * _MARGIN + len(rows) * step_down - _GAP + (_CAPTION_HEIGHT if captions else 0)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, images) in enumerate(rows):
        top = _MARGIN + number * step_down
        draw.text((_MARGIN, top + tile[1] // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture.paste(image, (left + column * step_right, top))
    for column, caption in enumerate(captions):
        centre = left + column * step_right + tile[0] // 2
        draw.text((centre, height - _MARGIN), caption, fill="black", font=font, anchor="md")
    return picture


def _tile(image: Float[Tensor, "c hh ww"], scale: int) -> Image.Image:
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    tile = to_8_bits(image.detach().float().cpu())
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
