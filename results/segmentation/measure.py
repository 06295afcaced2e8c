"""Do heads segment? Foregrounds that a model finds without labels, against masks that were drawn by hand.

    python results/segmentation/measure.py NAME IMAGES MASKS MODEL...

IMAGES is a folder, and MASKS one with a mask of the same name for each image, in which 0 is background. A MODEL is a
run or a bundled model, given after the same with `:untrained`, which is its control. Foregrounds are those of
`crate_mae.interpret.foregrounds`: of each layer the mean attention of the class token, that of each head, the
normalised cut of each head's affinities, and the first principal component of the tokens. Of all of them, over all
layers and heads, the one with the highest mean IoU on every other image is scored on the remaining images; next to the
controls, which need no network: all of the image, a centred disc as large as the mean foreground, the average
foreground of the images that heads are chosen on, and two clusters of colours. "Beyond shuffled" is what the masks of
the images score beyond those of the next image: it is 0 for a head that codes position alone.

The rule, written before the runs: a model segments if its best foreground beats, on the images that nothing was chosen
on, the best of the controls and the same network with random initialisation, both by more than twice the standard error
of the paired difference. (The average foreground became a control after a first look, in which a head drew nearly the
same column in the middle of every photograph; it makes the rule stricter.) Results: NAME.csv.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_mae.data import open_source
from crate_mae.evaluation.backbones import Backbone, open_backbone
from crate_mae.interpret.foregrounds import (
    CHOOSING,
    CORRECT_IOU,
    SCORED,
    AnnotatedImages,
    annotated_images,
    control_foregrounds,
    layer_foregrounds,
    overlaps,
    read_annotations,
)
from crate_mae.models.tracing import layers_of
from crate_mae.models.weights import UNTRAINED


def main() -> None:
    """Score all models, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source, annotations = open_source(str(options.images)), read_annotations(options.masks)
    rows: list[dict[str, Any]] = []
    scored: dict[str, Tensor] = {}
    for model in options.models:
        torch.manual_seed(0)  # of random initialisation
        backbone = open_backbone(model)
        annotated = annotated_images(annotations, source, range(len(source)), backbone)
        if not scored:
            for name, masks in control_foregrounds(annotated).items():
                scored[name] = overlaps(masks, annotated)[SCORED, 0]
                rows.append(line(name, "", "", "", scored[name]))
            best = max(scored.values(), key=lambda scores: float(scores.mean()))
        for kind, (place, scores, of_others) in best_foregrounds(backbone, annotated).items():
            scored[f"{model} {kind}"] = scores
            rows.append(line(model, kind, *place, scores) | versus("control", scores, best))
            rows[-1] |= versus("shuffled", scores, of_others)
            if (control := scored.get(f"{model}{UNTRAINED} {kind}")) is not None:
                rows[-1] |= versus("untrained", scores, control)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (Path(__file__).parent / f"{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def best_foregrounds(
    backbone: Backbone, annotated: AnnotatedImages
) -> dict[str, tuple[tuple[int, int], Tensor, Tensor]]:
    """The best foregrounds of each kind, and over all kinds: layer and head, IoU on other images, and when shuffled."""
    found: dict[str, tuple[float, tuple[int, int], Tensor, Tensor]] = {}
    for layer in range(len(layers_of(backbone.encoder))):
        for kind, masks in layer_foregrounds(backbone.encoder, annotated.images, layer).items():
            scores = overlaps(masks, annotated)
            chosen_on, head = scores[CHOOSING].mean(0).max(0)
            for name in (kind, "all"):
                if name not in found or float(chosen_on) > found[name][0]:
                    own = masks[:, [int(head)]]
                    shuffled = overlaps(own.roll(2, 0), annotated)[SCORED, 0]  # masks of other images that are scored
                    found[name] = float(chosen_on), (layer, int(head)), scores[SCORED, head], shuffled
    return {kind: (place, scores, shuffled) for kind, (_, place, scores, shuffled) in found.items()}


def line(model: str, kind: str, layer: int | str, head: int | str, scores: Tensor) -> dict[str, Any]:
    """A row of the table."""
    return {
        "model": model,
        "kind": kind,
        "layer": layer,
        "head": head,
        "images": len(scores),
        "miou": round(float(scores.mean()), 4),
        "error": round(standard_error(scores), 4),
        "found": round(float((scores > CORRECT_IOU).float().mean()), 4),
    }


def versus(name: str, scores: Tensor, control: Tensor) -> dict[str, float]:
    """The paired difference from a control, and its standard error."""
    difference = scores - control
    return {
        f"beyond_{name}": round(float(difference.mean()), 4),
        f"beyond_{name}_error": round(standard_error(difference), 4),
    }


def standard_error(values: Tensor) -> float:
    """Of the mean."""
    return float(values.std() / len(values) ** 0.5)


if __name__ == "__main__":
    main()
