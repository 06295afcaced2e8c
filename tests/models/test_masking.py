import pytest
import torch

import crate_mae
from crate_mae.models.completion import MASK_GREY, complete
from crate_mae.models.masking import (
    hide_all_but,
    patchify,
    random_mask,
    unpatchify,
    visible_from_noise,
    visible_indices,
)


@pytest.mark.parametrize(("n", "ratio", "hidden"), [(196, 0.75, 147), (17, 0.5, 9), (13, 0.01, 1), (10, 0.8, 9)])
def test_every_image_hides_the_official_number_of_patches(n, ratio, hidden):
    mask = random_mask(5, n, ratio, torch.Generator().manual_seed(0))
    assert (mask.sum(1) == hidden).all()


def test_all_patches_are_equally_likely_to_be_hidden():
    share = random_mask(20_000, 7, 0.5, torch.Generator().manual_seed(0)).float().mean(0)
    assert (share - 4 / 7).abs().max() < 0.02


def test_the_patches_with_the_least_noise_stay_visible():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.2, 0.2, 0.2]])
    visible = visible_from_noise(noise, 0.5)
    assert visible[0].tolist() == [1, 3]
    mask = hide_all_but(visible, 4)
    assert mask[0].tolist() == [True, False, True, False]
    assert mask.sum(dim=1).tolist() == [2, 2]  # also where noise ties
    assert torch.equal(visible_indices(mask), visible)


def test_visible_indices_are_ascending_and_complete():
    mask = torch.tensor([[True, False, True, False, False], [False, False, True, True, False]])
    assert visible_indices(mask).tolist() == [[1, 3, 4], [0, 1, 4]]


def test_patches_run_over_rows_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 is row 1, column 1 of the grid: pixels (2..3, 2..3), each with its three channels together.
    by_hand = [images[1, c, y, x].item() for y in (2, 3) for x in (2, 3) for c in range(3)]
    assert patches[1, 4].tolist() == by_hand
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)
    with pytest.raises(crate_mae.UserError, match="4 x 6 pixels cannot be cut into patches of 4 x 4"):
        patchify(images, 4)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_back_the_original_pixels(norm_pix_loss, monkeypatch):
    model = crate_mae.create_model("crate_mae_nano_patch2_8", norm_pix_loss=norm_pix_loss).eval()
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.mean, model.config.std))
    images = (pixels - mean) / std
    target = patchify(images, 2)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = random_mask(3, 16, 0.75, torch.Generator().manual_seed(0))
    perfect = model(images, mask=mask)._replace(prediction=target)
    monkeypatch.setattr(model, "forward", lambda *_args, **_kwargs: perfect)
    pictures = complete(model, images, mask)
    for picture in (pictures.original, pictures.completed):
        torch.testing.assert_close(picture, pixels, atol=1e-5, rtol=0)
    for picture, is_grey in ((pictures.masked, mask), (pictures.prediction, ~mask)):
        shown = patchify(picture, 2)
        assert (shown[is_grey] == MASK_GREY).all()
        torch.testing.assert_close(shown[~is_grey], patchify(pixels, 2)[~is_grey], atol=1e-5, rtol=0)


def test_completed_pictures_keep_what_was_visible():
    model = crate_mae.create_model("vit_mae_nano_patch2_8").eval()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.1
    mask = random_mask(3, 16, 0.5, torch.Generator().manual_seed(0))
    pictures = complete(model, images, mask)
    original, prediction, completed = (patchify(x, 2) for x in (pictures.original, *pictures[2:]))
    assert torch.equal(completed[~mask], original[~mask])
    assert torch.equal(completed[mask], prediction[mask])
