"""The app computes the same as the rest of the library."""

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.app.compute import (
    change_atom,
    complete_picture,
    fit_mask,
    look_inside,
    mask_from_text,
    mask_text,
    measure_curves,
    open_models,
    prepare,
    seeded_mask,
)
from crate_mae.errors import UserError
from crate_mae.evaluation.reconstruction import completion_quality
from crate_mae.interpret.measure import measure_layers
from crate_mae.interpret.statistics import find
from crate_mae.models.presets import create_model


@pytest.fixture(scope="module")
def small():
    """A model of a grid that is wider than high, three layers and two heads."""
    torch.manual_seed(0)
    settings = {"image_size": (10, 14), "depth": 3, "decoder_depth": 1, "embed_dim": 20, "num_heads": 2}
    return create_model("crate_mae_nano_patch2_8", **settings, decoder_num_heads=2).eval()


def test_a_picture_is_completed_as_by_the_command(models, photograph, tmp_path):
    from crate_mae.commands.reconstruct import reconstruct

    model = next(iter(models.values()))
    photograph.save(tmp_path / "picture.png")
    said = reconstruct(model.name, tmp_path / "picture.png", out=tmp_path / "out.png", seed=5, mask_ratio=0.5)
    found = complete_picture(model.net, photograph, seeded_mask(model.net, 0.5, seed=5))
    assert found.psnr == pytest.approx(said.psnr[0], abs=1e-4)
    assert found.pictures.original.shape == (1, 3, 32, 32)


def test_only_hidden_patches_are_completed_and_measured(small, photograph):
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 2:4] = True
    found = complete_picture(small, photograph, mask)
    changed = (found.pictures.completed != found.pictures.original).any(1)[0]
    assert changed[2:4, 4:8].any()
    changed[2:4, 4:8] = False
    assert not changed.any()
    assert found.psnr == float(completion_quality(found.pictures, mask.flatten()[None], 2).psnr[0])


def test_the_baseline_is_flat_patches_of_what_is_known(small, photograph):
    """By hand: the mean colour of what is visible; and each patch's own mean, if brightness is taken from it."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 2:4] = True
    original = complete_picture(small, photograph, mask).pictures.original[0]
    visible = torch.ones(10, 14, dtype=torch.bool)
    visible[2:4, 4:8] = False
    error = original[:, ~visible] - original[:, visible].mean(1, keepdim=True)
    found = complete_picture(small, photograph, mask).flat_psnr
    assert found == pytest.approx(float(-10 * error.square().mean().log10()), abs=1e-3)

    normalised = create_model("crate_mae_nano_patch2_8", norm_pix_loss=True, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    found = complete_picture(normalised, photograph, mask)
    error = found.pictures.original[0, :, :2, :2] - found.pictures.original[0, :, :2, :2].mean()
    assert found.flat_psnr == pytest.approx(float(-10 * error.square().mean().log10()), abs=1e-3)


def test_all_may_be_hidden_but_not_nothing(small, photograph):
    assert np.isfinite(complete_picture(small, photograph, torch.ones(5, 7, dtype=torch.bool)).psnr)
    with pytest.raises(UserError, match="Nothing is hidden"):
        complete_picture(small, photograph, torch.zeros(5, 7, dtype=torch.bool))


def test_attention_of_a_patch_is_that_of_its_own_tokens(small, photograph):
    """By hand: the cosine-free softmax of the projections of one layer, with the class token first."""
    layer, patch = 1, 10
    found = look_inside(small, photograph, layer, patch)
    assert found.heads.shape == (2, 5, 7)
    assert found.colours.shape == (5, 7, 3)
    assert 0 < found.explained <= 1
    assert (found.patch, found.even) == (10, pytest.approx(1 / 36))
    block = small.encoder.blocks[layer]
    with torch.no_grad():
        tokens = small.encoder.forward_intermediates(
            prepare(small, photograph),
            indices=[0],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = tokens[0]
        w = block.attn.subspaces(block.norm1(torch.cat([prefix, patches], dim=1)))[0].unflatten(-1, (2, 10))
        scores = torch.einsum("hp,nhp->hn", w[1 + patch], w) / 10**0.5
        expected = scores.softmax(dim=-1)[:, 1:].unflatten(1, (5, 7))
    np.testing.assert_allclose(found.heads, expected.numpy(), atol=1e-6)


def test_attention_differs_between_patches_and_layers(small, photograph):
    first = look_inside(small, photograph, 0, 3).heads
    assert np.abs(first - look_inside(small, photograph, 0, 30).heads).max() > 1e-4
    assert np.abs(first - look_inside(small, photograph, 2, 3).heads).max() > 1e-4


def test_there_is_no_such_patch_or_layer(small, photograph):
    for layer, patch in ((0, 35), (0, -1), (3, 0)):
        with pytest.raises(UserError, match="There is no"):
            look_inside(small, photograph, layer, patch)


def test_curves_are_those_of_the_library(small, photograph, tmp_path):
    photograph.save(tmp_path / "picture.png")
    rows = measure_layers(small, tmp_path / "picture.png").rows
    curves = measure_curves(small, photograph)
    for curve, measure, point in (
        (curves.rate_before, "subspace_rate_normalised", "z"),
        (curves.rate_after, "subspace_rate_normalised", "z_half"),
        (curves.zeros, "zero_fraction", "code"),
    ):
        assert curve == pytest.approx([row.mean for row in find(rows, measure, point)], rel=1e-5)
        assert len(curve) == 3


def test_a_transformer_has_attention_but_no_such_curves(photograph):
    twin = create_model("vit_mae_nano_patch2_8").eval()
    assert measure_curves(twin, photograph) == ([], [], [], [])
    assert look_inside(twin, photograph, 0, 5).heads.shape == (4, 4, 4)


def test_damaged_weights_are_explained(small, photograph):
    damaged = create_model("crate_mae_nano_patch2_8").eval()
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter.fill_(torch.nan)
    mask = torch.ones(4, 4, dtype=torch.bool)
    for question in (
        lambda: complete_picture(damaged, photograph, mask),
        lambda: look_inside(damaged, photograph, 0, 0),
        lambda: measure_curves(damaged, photograph),
    ):
        with pytest.raises(UserError, match="finite"):
            question()


def test_grey_models_take_colour(photograph):
    model = create_model("crate_mae_nano_patch2_8", in_chans=1).eval()
    found = complete_picture(model, photograph, torch.ones(4, 4, dtype=torch.bool))
    assert found.pictures.original.shape == (1, 1, 8, 8)


def test_a_mask_is_unchanged_by_text(small):
    mask = seeded_mask(small, 0.6, seed=3)
    assert mask.shape == (5, 7)
    assert mask.sum() == 21
    assert torch.equal(mask_from_text(mask_text(mask), (5, 7)), mask)


@pytest.mark.parametrize("text", [None, "", "0" * 34, "2" * 35, 35 * [0], "0" * 34 + "x"])
def test_invalid_masks_are_refused(text):
    with pytest.raises(UserError, match="mask does not fit"):
        mask_from_text(text, (5, 7))


def test_a_mask_fits_another_grid():
    mask = torch.tensor([[True, False], [False, False]])
    assert fit_mask(mask, (4, 4)).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert torch.equal(fit_mask(fit_mask(mask, (6, 10)), (2, 2)), mask)


def test_models_are_opened_by_name_once(tmp_path):
    found = open_models(["crate_mae_nano_patch2_8", "crate_mae_nano_patch2_8"])
    assert list(found) == ["crate_mae_nano_patch2_8"]
    model = found["crate_mae_nano_patch2_8"]
    assert model.is_random
    assert not model.net.training
    assert model.untrained is model.untrained
    with pytest.raises(UserError, match="does not exist"):
        open_models([str(tmp_path / "nowhere")])


def test_a_model_of_other_channels_is_refused(tmp_path):
    from crate_mae.models.weights import save

    save(create_model("crate_mae_nano_patch2_8", in_chans=5), tmp_path)
    with pytest.raises(UserError, match="5 channels"):
        open_models([str(tmp_path)])


def test_examples_are_colour_pictures_that_differ():
    from crate_mae.app.pictures import examples

    found = examples()
    assert len({each.title for each in found}) == len(found) >= 4
    for each in found:
        assert each.image.mode == "RGB"
        assert np.asarray(each.image.resize((32, 32), Image.Resampling.BOX)).std() > 20


def test_an_atom_is_changed_in_visible_patches_and_drawn(small, photograph):
    """By hand: the same standard deviations added to the code, class token left out, nothing below zero."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 2:4] = True
    image = prepare(small, photograph)
    is_patch = torch.tensor([False, *(~mask).flatten().tolist()])  # hidden patches are tokens of this encoder, too
    with torch.no_grad():
        layer = small.encoder.blocks[1]
        codes = []
        hook = layer.register_forward_hook(lambda _module, _inputs, output: codes.append(output))
        small.encoder.forward_features(image)
        hook.remove()
        whole = codes[0][0, 1:]
        for amount in (5.0, -20.0):
            found = change_atom(small, photograph, mask, 1, 3, amount)

            def raised(_module, _inputs, output, amount=amount):
                output = output.clone()
                moved = (output[:, is_patch, 3] + amount * whole.std()).clamp(min=0)
                output[:, is_patch, 3] = moved
                return output

            hook = layer.register_forward_hook(raised)
            expected = complete_picture(small, photograph, mask).pictures.completed[0]
            hook.remove()
            torch.testing.assert_close(found.changed, expected)
            plain = complete_picture(small, photograph, mask).pictures.completed[0]
            torch.testing.assert_close(found.completed, plain)
            hidden = (expected - plain)[:, 2:4, 4:8]
            assert found.size == pytest.approx(float(hidden.square().mean().sqrt()), rel=1e-4)
            assert found.size > 0
    np.testing.assert_allclose(found.active, whole[:, 3].unflatten(0, (5, 7)).numpy(), rtol=1e-5)
    assert found.varied[0] == int(whole.std(0).argmax())
    assert found.atoms == 20
    assert change_atom(small, photograph, mask, 1, 3, 0.0).size == 0


def test_what_cannot_be_changed_is_explained(small, photograph):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0] = False
    with pytest.raises(UserError, match="no atom 20 in layer 1: its code has 20, 0 to 19"):
        change_atom(small, photograph, mask, 1, 20, 1.0)
    with pytest.raises(UserError, match="Nothing is hidden"):
        change_atom(small, photograph, torch.zeros_like(mask), 1, 3, 1.0)
    torch.manual_seed(0)
    transformer = create_model("vit_mae_nano_patch2_8").eval()
    with pytest.raises(UserError, match="only the layers of CRATE have sparse codes"):
        change_atom(transformer, photograph, torch.ones(4, 4, dtype=torch.bool), 0, 3, 1.0)
