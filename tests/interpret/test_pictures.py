"""Maps on finer grids against strided pooling, and figures against the arrays that they are of."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from crate_mae.errors import UserError
from crate_mae.interpret.attention import attention_on_grid, class_attention, overlapping
from crate_mae.interpret.curves import draw_layers
from crate_mae.interpret.measure import measure_layers
from crate_mae.interpret.pictures import Tile, draw_attention, draw_tiles, draw_token_colours
from crate_mae.interpret.tokens import encode_patches, to_pictures, token_grid
from crate_mae.models.tracing import trace


@pytest.fixture
def wide():
    """Images of 12 x 18 pixels, in 2 x 3 patches of 6 x 6."""
    return torch.randn(2, 3, 12, 18, generator=torch.Generator().manual_seed(0))


def pooled(patch):
    """Two maps that say what is under each patch, whatever stands elsewhere."""
    return lambda images: F.avg_pool2d(images[:, :2], patch)


def shown(figure):
    """The arrays of the pictures, by their rows and columns."""
    pictures = figure.axes[0].images
    lefts, _, _, tops = (sorted(set(edges)) for edges in zip(*(each.get_extent() for each in pictures), strict=True))
    places = {(tops.index(each.get_extent()[3]), lefts.index(each.get_extent()[0])): each for each in pictures}
    assert len(places) == len(pictures)
    assert all(later - earlier > 1 for earlier, later in pairwise(lefts))  # inches: none lies on another
    return {place: each.get_array() for place, each in places.items()}


def titles(figure):
    return [text.get_text() for text in figure.axes[0].texts if text.get_verticalalignment() == "bottom"]


def captions(figure):
    return {text.get_text() for text in figure.axes[0].texts if text.get_verticalalignment() == "top"}


@pytest.mark.parametrize(("stride", "above", "below"), [(1, 2, 3), (2, 2, 2), (3, 1, 2)])
def test_overlapping_maps_are_those_of_every_place(wide, stride, above, below):
    fine = overlapping(wide, (2, 3), stride, pooled(6))
    assert fine.shape == (2, 2, 12 // stride, 18 // stride)
    mirrored = F.pad(wide[:, :2], (above, below, above, below), mode="reflect")
    torch.testing.assert_close(fine, F.avg_pool2d(mirrored, 6, stride=stride) / (6 // stride) ** 2)


@pytest.mark.parametrize("stride", [None, 6])
def test_a_stride_of_a_patch_is_a_single_pass(wide, stride):
    assert torch.equal(overlapping(wide, (2, 3), stride, pooled(6)), pooled(6)(wide))


def test_the_unshifted_pass_stands_in_the_middle_of_its_patches(wide):
    fine = overlapping(wide, (2, 3), 2, pooled(6))
    torch.testing.assert_close(fine[..., 1::3, 1::3] * 9, pooled(6)(wide))


def test_patches_need_not_be_square(wide):
    fine = overlapping(wide, (2, 2), 3, pooled((6, 9)))
    mirrored = F.pad(wide[:, :2], (3, 3, 1, 2), mode="reflect")
    torch.testing.assert_close(fine, F.avg_pool2d(mirrored, (6, 9), stride=3) / (2 * 3))


@pytest.mark.parametrize("stride", [0, -1, 4, 5, 12])
def test_a_stride_that_does_not_divide_a_patch_is_refused(wide, stride):
    with pytest.raises(UserError, match=rf"stride of {stride} .* 6 x 6 pixels: take one of 1, 2, 3, 6\."):
        overlapping(wide, (2, 3), stride, pooled(6))


@pytest.mark.parametrize("name", ["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_is_that_of_the_traced_pass(build, images, name, layer):
    encoder = build(name).encoder.train()
    found = class_attention(encoder, images, layer=layer)
    assert encoder.training and not any(module._forward_hooks for module in encoder.modules())
    encoder.eval()
    with torch.no_grad(), trace(encoder, [f"blocks.{layer % 2}.attention"]) as record:
        encoder.forward_features(images)
    (attention,) = record[f"blocks.{layer % 2}.attention"]
    torch.testing.assert_close(found.heads, attention_on_grid(attention, (4, 4)))
    mean = attention_on_grid(attention, (4, 4)).mean(1)
    torch.testing.assert_close(found.saliency, mean / mean.sum((1, 2), keepdim=True))


def test_finer_attention_is_of_shifted_images_and_stays_a_share(build, images):
    encoder = build().encoder
    fine = class_attention(encoder, images, stride=1)
    assert fine.heads.shape == (7, 3, 8, 8)
    torch.testing.assert_close(fine.saliency.sum((1, 2)), torch.ones(7))
    assert (fine.heads.sum((2, 3)) < 1).all()
    torch.testing.assert_close(fine.heads[..., ::2, ::2] * 4, class_attention(encoder, images).heads)
    right = torch.cat([images[..., 1:], images[..., -2:-1]], dim=-1)  # the column before the last one, mirrored
    torch.testing.assert_close(fine.heads[..., ::2, 1::2] * 4, class_attention(encoder, right).heads)


def test_more_images_than_fit_in_a_pass_are_the_same(build, images):
    encoder, many = build().encoder, images.repeat(3, 1, 1, 1)
    torch.testing.assert_close(class_attention(encoder, many).heads[14:], class_attention(encoder, images).heads)
    assert encode_patches(encoder, many).shape == (21, 16, 24)


def test_networks_without_what_is_shown_are_named():
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="no class token"):
        class_attention(VisionTransformer(**small, class_token=False, global_pool="avg"), image)
    with pytest.raises(UserError, match="No layer of this Conv2d has attention"):
        class_attention(torch.nn.Conv2d(3, 3, 1), image)
    with pytest.raises(UserError, match="no layer 1"):
        class_attention(VisionTransformer(**small), image, layer=1)
    registers = VisionTransformer(**small, reg_tokens=3)
    assert class_attention(registers, image).heads.shape == (1, 2, 2, 2)


def test_weights_that_are_not_finite_are_named(build, images):
    encoder = build().encoder
    torch.nn.init.constant_(encoder.blocks[0].ista.dictionary, float("nan"))
    with pytest.raises(UserError, match="hold NaN"):
        class_attention(encoder, images)


def test_tokens_lie_on_the_grid_of_patches_or_of_the_feature_map(build):
    assert token_grid(build(image_size=(8, 6)).encoder, (8, 6), 12) == (4, 3)
    network = torch.nn.Module()
    network.feature_info = [{"reduction": 8}, {"reduction": 16}]
    assert token_grid(network, (32, 40), 20, layer=0) == (4, 5)
    assert token_grid(network, (32, 40), 6) == (2, 3)
    with pytest.raises(UserError, match="do not lie on a grid"):
        token_grid(network, (32, 40), 7)


def test_images_are_shown_as_they_were():
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(to_pictures(normalised, mean, std), pixels.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    for channels in (1, 4):
        grey = to_pictures(torch.zeros(1, channels, 4, 5), (0.25,) * channels, (1.0,) * channels)
        assert grey.shape == (1, 4, 5, 3) and (grey == 0.25).all()


def test_every_image_has_a_row_and_every_head_a_column():
    generator = np.random.default_rng(0)
    pictures, heads = generator.random((2, 6, 9, 3)), generator.random((2, 5, 2, 3))
    saliency = np.array([[[0.7, 0.1, 0.1], [0.1, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    cells = shown(draw_attention(pictures, heads, saliency))
    assert set(cells) == {(row, column) for row in range(2) for column in range(8)}
    assert (cells[1, 0] == pictures[1]).all() and (cells[0, 1] == saliency[0]).all()
    assert (cells[1, 7] == heads[1, 4]).all()
    # Six tenths are in one patch: 3 x 3 pixels of the picture.
    assert (cells[0, 2][:3, :3] == pictures[0, :3, :3]).all()
    np.testing.assert_allclose(cells[0, 2][3:], 0.2 * pictures[0, 3:] + 0.8 * np.array([0.0, 0.45, 0.7]))


def test_many_heads_take_several_lines():
    figure = draw_attention(np.zeros((2, 4, 4, 3)), np.ones((2, 12, 2, 2)), np.full((2, 2, 2), 0.25))
    cells = shown(figure)
    assert len(cells) == 2 * (3 + 12) and (1, 0) not in cells and (3, 8) in cells
    assert titles(figure) == ["image", "all heads", "60% of that", *(f"head {head}" for head in range(12))]
    assert captions(figure) == {"1.0"}  # even attention


@pytest.mark.parametrize("joint", [False, True])
def test_colours_stand_below_their_images(joint):
    generator = np.random.default_rng(0)
    pictures, colours = generator.random((10, 4, 4, 3)), generator.random((10, 2, 2, 3))
    explained = np.full((1 if joint else 10, 3), 0.2)
    figure = draw_token_colours(pictures, colours, explained)
    cells = shown(figure)
    assert len(cells) == 20
    assert (cells[2, 1] == pictures[6]).all() and (cells[3, 1] == colours[6]).all()
    assert captions(figure) == (set() if joint else {"60%"})
    assert ("60% of their variance" in figure.get_suptitle()) == joint


def test_layers_of_both_parts_and_of_the_control_are_drawn(build):
    rows = measure_layers(build(mean=(0.3,), std=(0.4,)), "digits:test", count=4, audited=False).rows
    rates, zeros, *_ = draw_layers(rows, rows).axes
    assert [text.get_text() for text in rates.figure.legends[0].get_texts()] == [
        *("input", "input, control", "after the first step", "after the first step, control", "output"),
        "output, control",
    ]
    places = [list(line.get_xdata()) for line in rates.lines if len(line.get_xdata()) == 2]
    assert places.count([0, 1]) == places.count([2, 3]) == 6  # three points, of model and control
    assert [line.get_linestyle() for line in zeros.lines] == ["-", "--"]
    assert [label.get_text() for label in rates.get_xticklabels()] == ["E0", "E1", "D0", "D1"]
    measured = [row.mean for row in rows if (row.measure, row.point) == ("zero_fraction", "code")]
    assert list(zeros.lines[0].get_ydata()) == measured


def test_a_network_without_subspaces_shows_its_stand_in_and_ranks(build):
    encoder = build("vit_mae_nano_patch2_8", in_chans=3).encoder
    figure = draw_layers(measure_layers(encoder, "digits:test", count=2, audited=False).rows)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "stand-in for R$^c$, by value projections (nats)",
        "effective rank of an image’s tokens",
        "effective rank of images’ features",
    ]
    assert {axes.get_xlabel() for axes in figure.axes if axes.get_title()} == {"layer of the encoder"}


@pytest.mark.parametrize("columns", [1, 3, 9])
def test_a_heading_is_as_wide_as_the_figure_at_most(columns):
    tile = Tile(np.zeros((8, 8, 3)))
    figure = draw_tiles([[tile] * columns], tile_width=1.25, heading="the mean patch is weighted by activation " * 4)
    (text,) = figure.texts
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    highest = max(image.get_window_extent().y1 for axes in figure.axes for image in axes.images)
    assert highest < box.y0 < box.y1 <= figure.bbox.height
