"""Foregrounds that were annotated: how they are read, how they follow their images, and what is right."""

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import open_source
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.interpret import foregrounds
from crate_mae.interpret.foregrounds import (
    annotated_images,
    average_mask,
    colour_mask,
    control_foregrounds,
    cut_mask,
    disc_mask,
    read_annotations,
    score_foregrounds,
)
from crate_mae.interpret.statistics import find

HEADER = "image,left,top,right,bottom\n"


@pytest.fixture
def pictures(tmp_path):
    """Three images of 16 x 24 pixels: a bright thing on dark ground, in another place each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (top, left) in enumerate([(0, 4), (4, 8), (8, 12)]):
        pixels = np.full((16, 24), 20, dtype=np.uint8)
        pixels[top : top + 8, left : left + 8] = 220
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def masks(pictures, tmp_path):
    folder = tmp_path / "masks" / "below"
    folder.mkdir(parents=True)
    for path in pictures.iterdir():
        bright = np.asarray(Image.open(path)) > 128
        Image.fromarray(bright.astype(np.uint8)).save(folder / path.name)  # 1 is foreground, as in many data sets
    return folder.parent


def annotated(path, pictures, model, indices=range(3)):
    return annotated_images(read_annotations(path), open_source(pictures), indices, open_backbone(model))


def test_masks_follow_their_images(pictures, masks, build):
    """Scaled to 8 x 12 and cropped to 8 x 8: a mask is where its image is bright."""
    found = annotated(masks, pictures, build(), range(1, 3))
    assert found.images.shape == (2, 1, 8, 8)
    middle = (found.images.amax() + found.images.amin()) / 2
    assert torch.equal(found.masks, found.images[:, 0] > middle)
    assert [box.tolist() for box in found.boxes] == [[[2, 2, 6, 6]], [[4, 4, 8, 8]]]


def test_boxes_follow_their_images_and_may_be_several(pictures, build, tmp_path):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(HEADER + "1.png,8,4,16,12\nelsewhere/2.jpg,12,8,20,16\n2,4.0,-3,8,4\n")
    found = annotated(boxes, pictures, build())
    assert found.masks is None and len(found.images) == 2  # the first has no annotation
    assert [box.tolist() for box in found.boxes] == [[[2, 2, 6, 6]], [[4, 4, 8, 8], [0, 0, 2, 2]]]


def test_what_is_found_is_scored(pictures, masks, build, monkeypatch):
    net = build()
    found = annotated(masks, pictures, net, range(1, 3))
    right, left_half = found.masks.clone(), torch.zeros_like(found.masks)
    left_half[:, :, :4] = True
    found_ones = {"component": right[:, None], "best head": torch.stack([left_half, right], 1)}
    monkeypatch.setattr(foregrounds, "layer_foregrounds", lambda *_: found_ones)
    monkeypatch.setattr(foregrounds, "control_foregrounds", lambda _: {"everything": left_half[:, None]})
    rows = score_foregrounds(net.encoder, found)
    assert [r.mean for r in find(rows, "foreground_iou", "component")] == [1.0, 1.0]  # of two layers
    assert find(rows, "correct_localisation", "component")[0].mean == 1
    chosen = find(rows, "foreground_iou", "best head")[0]  # on the first image, scored on the second
    assert (chosen.mean, chosen.n) == (1.0, 1)
    # Of 32 pixels, 8 and none are of the thing, which has 16.
    assert find(rows, "foreground_iou", "everything")[0].mean == pytest.approx((8 / 40 + 0) / 2)
    wrong = find(rows, "correct_localisation", "everything")[0]
    assert (wrong.mean, wrong.n, wrong.over) == (0, 2, "images")


def test_a_network_is_scored_by_attention_and_component(pictures, masks, build):
    net = build()
    rows = score_foregrounds(net.encoder, annotated(masks, pictures, net))
    for measure in ("foreground_iou", "correct_localisation"):
        for kind in (*foregrounds.KINDS, *foregrounds.CONTROLS):
            assert [0 <= r.mean <= 1 for r in find(rows, measure, kind)] == [True, True]
    # The thing is brighter than the ground: one side of the first component is the thing.
    assert find(rows, "foreground_iou", "component")[0].mean > find(rows, "foreground_iou", "everything")[0].mean


def test_without_a_class_token_there_is_no_attention(pictures, masks):
    import timm

    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **small)
    rows = score_foregrounds(model, annotated(masks, pictures, model))
    assert {r.point for r in rows} == {"best cut", "component", *foregrounds.CONTROLS}


def test_a_normalised_cut_parts_two_groups_and_takes_the_one_inside():
    inside = torch.zeros(5, 5, dtype=torch.bool)
    inside[1:4, 2:4] = True
    member = inside.flatten().double()
    same = torch.outer(member, member) + torch.outer(1 - member, 1 - member)
    affinity = same + 0.1 + torch.rand(25, 25, generator=torch.Generator().manual_seed(0)).double() * 0.01
    affinity = torch.stack([(affinity + affinity.mT) / 2, torch.ones(25, 25)])
    assert torch.equal(cut_mask(affinity, (5, 5))[0], inside)


def test_controls_know_colours_and_sizes_alone(pictures, masks, build):
    found = annotated(masks, pictures, build())
    controls = control_foregrounds(found)
    things = found.masks.float().mean((1, 2))
    # The thing of the first image touches the border more than the ground does not: its side has more of the border.
    assert torch.equal(controls["colours"][1:, 0], found.masks[1:])
    assert controls["disc"].float().mean((1, 2, 3)).tolist() == pytest.approx([things[::2].mean().item()] * 3, abs=0.01)
    assert colour_mask(torch.ones(1, 3, 4, 4)).sum() == 0
    assert torch.equal(disc_mask((3, 3), 5 / 9).int(), torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).int())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,left\n1,2\n", "must have the columns image,left,top,right,bottom"),
        (HEADER, "holds no boxes"),
        (HEADER + "1,2,3,4,five\n", "line 2: a side of the box is not a number"),
        (HEADER + "1,2,3,4\n", "line 2: a side of the box is not a number"),
        (HEADER + "1,2,3,4,5\n1,4,3,2,5\n", "line 3: left must be less than right"),
        (HEADER + "1,2,3,inf,5\n", "line 2: a side of the box is not finite"),
        (HEADER + ",1,2,3,4\n", "line 2: there is no name of an image"),
        ("left,top,right,bottom,image\n1,2,3,4\n", "line 2: there is no name of an image"),
        (HEADER + "caf\xe9,1,2,3,4\n", "cannot be read as a table"),
    ],
)
def test_odd_boxes_are_named(tmp_path, content, words):
    (tmp_path / "boxes.csv").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=words):
        read_annotations(tmp_path / "boxes.csv")


def test_unreadable_masks_are_counted_and_named(pictures, masks, build):
    (masks / "below" / "1.png").write_bytes(b"nothing")
    found = annotated(masks, pictures, build())
    assert len(found.images) == 2 and [mask.location for mask in found.bad] == [str(masks / "below" / "1.png")]
    (masks / "below" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)2 of 3 masks of --foregrounds cannot be read, such as\n.*1\.png: "):
        annotated(masks, pictures, build())


def test_odd_masks_are_named(pictures, masks, build, tmp_path):
    with pytest.raises(UserError, match="neither a folder of masks nor"):
        read_annotations(tmp_path / "nowhere")
    with pytest.raises(UserError, match="No foreground belongs to a measured image"):
        annotated_images(read_annotations(masks), open_source("digits:test"), range(4), open_backbone(build()))
    Image.new("L", (5, 7)).save(masks / "below" / "1.png")
    with pytest.raises(UserError, match=r"1\.png has 5 x 7 pixels, its image 24 x 16"):
        annotated(masks, pictures, build())
    (masks / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="Two masks are called 1"):
        read_annotations(masks)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no masks"):
        read_annotations(tmp_path / "empty")


def test_the_average_foreground_is_where_most_have_theirs():
    masks = torch.zeros(4, 3, 3, dtype=torch.bool)
    masks[:, 1, 1] = True
    masks[:3, 0, 1] = True
    masks[0, 2, 2] = True
    assert torch.equal(average_mask(masks).int(), torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0]]).int())
