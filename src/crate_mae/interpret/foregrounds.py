"""Foregrounds annotated by hand, and how well a network that was trained without labels finds them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy import ndimage
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torchvision.ops import box_iou

from crate_mae.data import BadImage, ImageSource
from crate_mae.data.base import most_bad, path_text, read_all, read_file
from crate_mae.data.decode import UnreadableImage, decode, size_of
from crate_mae.data.numbers import MAX_BAD
from crate_mae.errors import UserError, first_line
from crate_mae.evaluation.backbones import Backbone
from crate_mae.interpret.attention import class_attention, patch_affinities
from crate_mae.interpret.statistics import Row, Statistic, row, statistic
from crate_mae.interpret.tokens import encode_patches, grid_size, to_pictures
from crate_mae.models.tracing import layers_of

FOREGROUND_MASS = 0.6  # DINO's share of the attention that makes the foreground
CORRECT_IOU = 0.5
KINDS = ("attention", "best head", "best cut", "component")
CONTROLS = ("everything", "disc", "average", "colours")  # which need no network
_COLUMNS = ("image", "left", "top", "right", "bottom")

CHOOSING, SCORED = slice(0, None, 2), slice(1, None, 2)  # images on which a head is chosen, and scored

Box = tuple[float, float, float, float]  # left, top, right, bottom, the last two beyond it, in pixels
# Foregrounds by the names of images without folder and ending: files of masks, whose pixels that are not 0 are
# foreground, or boxes, at least one of each image.
Annotations = Mapping[str, Path] | Mapping[str, list[Box]]


class AnnotatedImages(NamedTuple):
    """Images with their annotated foregrounds, both as a network takes them.

    Attributes:
        images: normalised.
        masks: the foregrounds; None if there are boxes, which hold more than it.
        boxes: of each image the annotated ones, or that of its mask's largest part; top, left, bottom, right.
        bad: the masks that cannot be read; their images are left out.
    """

    images: Float[Tensor, "b c hh ww"]
    masks: Bool[Tensor, "b hh ww"] | None
    boxes: list[Int[Tensor, "k 4"]]
    bad: list[BadImage]


def read_annotations(path: Path) -> Annotations:
    """Masks of a folder, or boxes of a .csv file with the columns image, left, top, right, bottom.

    Raises:
        UserError: if there are none, two masks have one name, or a line of the file is invalid.
    """
    if path.is_dir():
        return _mask_files(path)
    if path.suffix.lower() == ".csv" and path.is_file():
        return _boxes_of(path)
    raise UserError(f"{path} is neither a folder of masks nor a .csv file of boxes ({','.join(_COLUMNS)}).")


def annotated_images(
    annotations: Annotations, source: ImageSource, indices: Iterable[int], backbone: Backbone
) -> AnnotatedImages:
    """The images with an annotated foreground, and their foregrounds, scaled and cropped alike.

    Raises:
        UserError: if no image has one, a mask has another size than its image, or too many masks cannot be read.
    """
    transform, images, masks, boxes, bad = backbone.transform(), [], [], [], []
    annotated = {i: annotations[name] for i in indices if (name := Path(source.location(i)).stem) in annotations}
    # Images that cannot be read are reported where images are measured.
    read, _ = read_all(source, annotated, lambda picture: (transform(picture), size_of(picture)))
    for i, (image, size) in read.items():
        try:
            parts = _parts(annotated[i], size)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
            continue
        prepared = torch.stack([_prepared(part, backbone) for part in parts])
        images.append(image)
        masks.append(prepared.any(0))
        boxes.append(largest_boxes(prepared))
    total = len(images) + len(bad)
    if len(bad) > most_bad(MAX_BAD, total) or (bad and not images):
        raise UserError(
            f"{len(bad)} of {total} masks of --foregrounds cannot be read, such as\n"
            f"{bad[0].location}: {bad[0].reason}\nFix them, or remove them with their images."
        )
    if not images:
        raise UserError(
            f"No foreground belongs to a measured image, such as {path_text(Path(source.location(0)))}.\n"
            "A mask, or a line of a .csv file, must have the name of its image, without the ending."
        )
    are_masks = all(isinstance(annotation, Path) for annotation in annotations.values())
    return AnnotatedImages(torch.stack(images), torch.stack(masks) if are_masks else None, boxes, bad)


def mass_mask(saliency: Float[Tensor, "b gh gw"], mass: float = FOREGROUND_MASS) -> Bool[Tensor, "b gh gw"]:
    """The fewest patches that hold a share `mass` of the saliency: foreground as in DINO (Caron et al. 2021)."""
    values, order = saliency.flatten(1).sort(dim=1, descending=True, stable=True)
    before = values.cumsum(1) - values
    kept = before < mass * values.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, order, kept).unflatten(1, saliency.shape[1:])


def principal_mask(patches: Float[Tensor, "b n d"], grid_size: tuple[int, int]) -> Bool[Tensor, "b gh gw"]:
    """Foreground by the sign of each image's first principal component of its tokens.

    The sign of a component is arbitrary: foreground is the side that has less of the border of the image. Equal tokens
    have no foreground.
    """
    centred = patches.double() - patches.double().mean(1, keepdim=True)
    scores = torch.linalg.svd(centred, full_matrices=False)
    first = (scores.U[..., 0] * scores.S[..., :1]).unflatten(1, grid_size)
    size = patches.double().square().sum((1, 2))
    return _inner_side(first) & (scores.S[:, 0].square() > 1e-12 * size)[:, None, None]


def cut_mask(affinity: Float[Tensor, "b n n"], grid_size: tuple[int, int]) -> Bool[Tensor, "b gh gw"]:
    r"""Foreground by the normalised cut of a symmetric affinity A between patches.

    With G the diagonal of row sums, the second eigenvector of $G^{-1/2} A G^{-1/2}$, divided by the square roots of G,
    minimises the relaxed cut (Shi & Malik 2000). As in TokenCut (Wang et al. 2022) it is split at its mean; which side
    is the foreground is decided as in `principal_mask`.
    """
    affinity = affinity.double()
    scale = affinity.sum(-1).rsqrt()
    vectors = torch.linalg.eigh(scale[:, :, None] * affinity * scale[:, None, :]).eigenvectors
    second = vectors[..., -2] * scale
    return _inner_side((second - second.mean(1, keepdim=True)).unflatten(1, grid_size))


def colour_mask(images: Float[Tensor, "b c hh ww"]) -> Bool[Tensor, "b hh ww"]:
    """Foreground by the colours of the pixels alone: two clusters of k-means, the side that has less of the border."""
    pixels = images.flatten(2).mT.double().numpy()
    clusters = KMeans(2, random_state=0)
    # An image of one colour has no clusters.
    sides = [clusters.fit_predict(image) if np.ptp(image, axis=0).any() else np.zeros(len(image)) for image in pixels]
    return _inner_side(torch.from_numpy(np.stack(sides)).unflatten(1, images.shape[2:]) - 0.5)


def disc_mask(size: tuple[int, int], share: float) -> Bool[Tensor, "hh ww"]:
    """The disc in the middle that covers a share of an image, cut off at its borders."""
    axes = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in size)
    distance = torch.cartesian_prod(*axes).norm(dim=1)
    return (distance.argsort().argsort() < round(share * distance.numel())).unflatten(0, size)


def average_mask(masks: Bool[Tensor, "b hh ww"]) -> Bool[Tensor, "hh ww"]:
    """The places that are foreground in at least a share of the images; the share with the highest mean overlap."""
    frequency = masks.float().mean(0)
    candidates = [frequency >= tenth / 10 for tenth in range(1, 10)]
    return max(candidates, key=lambda mask: float(intersection_over_union(mask.expand_as(masks), masks).mean()))


def _inner_side(signed: Float[Tensor, "b gh gw"]) -> Bool[Tensor, "b gh gw"]:
    """Of the places with positive and with negative values, those that have the smaller share on the border."""
    positive, negative = signed > 0, signed < 0
    border = torch.ones(signed.shape[1:], dtype=torch.bool, device=signed.device)
    border[1:-1, 1:-1] = False
    # Shares, not numbers: else the larger side would lose.
    outside = [(side & border).sum((1, 2)) / side.sum((1, 2)).clamp_min(1) for side in (positive, negative)]
    return torch.where((outside[0] <= outside[1])[:, None, None], positive, negative)


def score_foregrounds(encoder: nn.Module, annotated: AnnotatedImages) -> list[Row]:
    """Score the foregrounds that each layer finds, and those of controls that need no network.

    Of several heads, the one that is best on every other image is scored on the remaining images. Controls: the whole
    image, which is hard to beat where a large object is in the middle; of every other image, a centred disc as large as
    their mean foreground, and the average of their foregrounds, which a head that codes position alone can reach; and
    two clusters of colours.
    """
    controls = {kind: _scores(masks, annotated) for kind, masks in control_foregrounds(annotated).items()}
    rows = []
    for layer in range(len(layers_of(encoder))):
        masks_of = layer_foregrounds(encoder, annotated.images, layer)
        found = {kind: _scores(masks, annotated) for kind, masks in masks_of.items()}
        for kind, scores in (found | controls).items():
            rows += [row(("encoder", layer), measure, score, point=kind) for measure, score in scores.items()]
    return rows


def _scores(masks: Bool[Tensor, "b k hh ww"], annotated: AnnotatedImages) -> dict[str, Statistic]:
    """The scores of foregrounds, by measure; of several heads, those of the chosen one."""
    each, part, chosen = overlaps(masks, annotated), slice(None), 0
    if masks.shape[1] > 1:
        part, chosen = SCORED, int(each[CHOOSING].mean(0).argmax())
    scores = statistic(each[part, chosen])
    if annotated.masks is None:
        return {"correct_localisation": scores}
    localised = statistic(_localised(masks[part, chosen], annotated.boxes[part]))
    return {"foreground_iou": scores, "correct_localisation": localised}


def layer_foregrounds(
    encoder: nn.Module, images: Float[Tensor, "b c hh ww"], layer: int
) -> dict[str, Bool[Tensor, "b k hh ww"]]:
    """The foregrounds that one layer finds, as masks of pixels: by each head, or one.

    By attention of the class token (mean over heads, and each head): the fewest patches with 60% of it. By the
    normalised cut of each head's affinities between patches. By the first principal component of the tokens. A network
    without a class token has none by attention; with a single image no head can be chosen.
    """
    grid = grid_size(encoder)
    assert grid is not None, "the caller has checked"
    found: dict[str, Tensor] = {}
    with suppress(UserError):  # no class token, or no attention
        attention = class_attention(encoder, images, layer=layer)
        found["attention"] = mass_mask(attention.saliency)[:, None]
        found["best head"] = mass_mask(attention.heads.flatten(0, 1)).unflatten(0, attention.heads.shape[:2])
    with suppress(UserError):  # no attention
        parts = [
            cut_mask(affinity.flatten(0, 1), grid).unflatten(0, affinity.shape[:2])
            for affinity in patch_affinities(encoder, images, layer=layer)
        ]
        found["best cut"] = torch.cat(parts)
    found["component"] = principal_mask(encode_patches(encoder, images, layer), grid)[:, None]
    if len(images) == 1:
        found = {kind: masks for kind, masks in found.items() if masks.shape[1] == 1}
    rows, columns = images.shape[2] // grid[0], images.shape[3] // grid[1]  # pixels of a patch
    return {kind: masks.repeat_interleave(rows, 2).repeat_interleave(columns, 3) for kind, masks in found.items()}


def control_foregrounds(annotated: AnnotatedImages) -> dict[str, Bool[Tensor, "b 1 hh ww"]]:
    """Foregrounds that need no network, see `score_foregrounds`; boxes have no disc and no average."""
    images = annotated.images
    found = {"everything": torch.ones_like(images[:, :1], dtype=torch.bool)}
    if annotated.masks is not None:
        share = float(annotated.masks[CHOOSING].float().mean())
        found["disc"] = disc_mask((images.shape[2], images.shape[3]), share).expand(len(images), 1, -1, -1)
        found["average"] = average_mask(annotated.masks[CHOOSING]).expand(len(images), 1, -1, -1)
    return found | {"colours": colour_mask(images)[:, None]}


def overlaps(masks: Bool[Tensor, "b k hh ww"], annotated: AnnotatedImages) -> Float[Tensor, "b k"]:
    """Intersection over union with the masks; with boxes instead, 1 or 0 for localised correctly or not."""
    each = masks.unbind(1)
    if annotated.masks is None:
        return torch.stack([_localised(mask, annotated.boxes) for mask in each], 1)
    return torch.stack([intersection_over_union(mask, annotated.masks) for mask in each], 1)


def _localised(mask: Bool[Tensor, "b hh ww"], boxes: Sequence[Int[Tensor, "k 4"]]) -> Float[Tensor, "b"]:
    """1 for each image whose box is right, else 0."""
    found = largest_boxes(mask)
    overlaps = [box_iou(box[None], true).max() for box, true in zip(found, boxes, strict=True)]
    return (torch.stack(overlaps) > CORRECT_IOU).float()


def intersection_over_union(mask: Bool[Tensor, "b hh ww"], truth: Bool[Tensor, "b hh ww"]) -> Float[Tensor, "b"]:
    """|A and B| / |A or B| of each image; 1 where both are empty."""
    union = (mask | truth).sum((1, 2))
    return torch.where(union > 0, (mask & truth).sum((1, 2)) / union.clamp_min(1), 1.0)


def largest_boxes(mask: Bool[Tensor, "b gh gw"]) -> Int[Tensor, "b 4"]:
    """The box (top, left, bottom, right; the last two beyond it) of each mask's largest connected part.

    Neighbours share a side. An empty mask has the empty box 0, 0, 0, 0.
    """
    boxes = []
    for image in mask.cpu().numpy():
        found: Any = ndimage.label(image)
        parts, count = found
        if not count:
            boxes.append([0, 0, 0, 0])
            continue
        largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
        rows, columns = np.nonzero(parts == largest)
        boxes.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    return torch.tensor(np.array(boxes, dtype=np.int64))


def _mask_files(folder: Path) -> dict[str, Path]:
    endings, found = Image.registered_extensions(), {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings):
        if path.stem in found:
            raise UserError(f"Two masks are called {path.stem}: {found[path.stem]} and {path}.")
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder} holds no masks. Each is a picture with its image's name, and 0 is background.")
    return found


def _boxes_of(path: Path) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    try:
        table = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), restval="")
        columns, lines = table.fieldnames or [], list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {first_line(error)}.") from error
    if not set(_COLUMNS) <= set(columns):
        raise UserError(f"{path} must have the columns {','.join(_COLUMNS)} in its first line.")
    for number, line in enumerate(lines, start=2):
        try:
            left, top, right, bottom = sides = [float(line[name]) for name in _COLUMNS[1:]]
        except ValueError:
            raise UserError(f"{path}, line {number}: a side of the box is not a number.") from None
        if not all(map(math.isfinite, sides)):
            raise UserError(f"{path}, line {number}: a side of the box is not finite.")
        if not line["image"]:
            raise UserError(f"{path}, line {number}: there is no name of an image.")
        if not (left < right and top < bottom):
            raise UserError(f"{path}, line {number}: left must be less than right, and top less than bottom.")
        found.setdefault(Path(line["image"]).stem, []).append((left, top, right, bottom))
    if not found:
        raise UserError(f"{path} holds no boxes.")
    return found


def _parts(annotation: Path | list[Box], size: tuple[int, int]) -> list[Bool[np.ndarray, "hh ww"]]:
    """The annotated foreground of an image: its mask, or a mask of each box."""
    height, width = size
    if isinstance(annotation, Path):
        picture = decode(read_file(annotation, path_text(annotation)), path_text(annotation))
        if picture.size != (width, height):
            raise UserError(
                f"{annotation} has {picture.width} x {picture.height} pixels, its image {width} x {height}."
            )
        values = np.asarray(picture.convert("RGB") if len(picture.getbands()) > 1 else picture)
        return [values != 0 if values.ndim == 2 else (values != 0).any(-1)]
    parts = []
    for left, top, right, bottom in annotation:
        part = np.zeros((height, width), dtype=bool)
        part[max(round(top), 0) : max(round(bottom), 0), max(round(left), 0) : max(round(right), 0)] = True
        parts.append(part)
    return parts


def _prepared(part: Bool[np.ndarray, "_ _"], backbone: Backbone) -> Bool[Tensor, "hh ww"]:
    """A mask scaled and cropped as the network's images are: by the same code, as a picture."""
    values = backbone.transform()(Image.fromarray(part.astype(np.uint8) * 255))
    return torch.from_numpy(to_pictures(values[None], backbone.mean, backbone.std)[0]).mean(-1) > 0.5
