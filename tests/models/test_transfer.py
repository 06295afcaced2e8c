"""Models that start from the weights of others."""

import pytest
import torch
import torch.nn.functional as F

import crate_mae
from crate_mae.errors import UserError
from crate_mae.models.masking import unpatchify
from crate_mae.models.presets import preset
from crate_mae.models.transfer import resized_config, start_from

NANO = "crate_mae_nano_visible_patch2_8"


def images(channels=3, size=8):
    return torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0))


def smooth(size):
    """Images that can be enlarged without loss worth mentioning."""
    return F.interpolate(images(size=4), size=(size, size), mode="bicubic", antialias=True)


def test_a_model_of_the_same_kind_takes_all_weights():
    old, new = crate_mae.create_model(NANO).eval(), crate_mae.create_model(NANO).eval()
    found = start_from(new, old.state_dict())
    assert (found.initialised, str(found)) == ((), "all weights")
    torch.testing.assert_close(
        new(images(), mask_ratio=0.5).loss, old(images(), mask_ratio=0.5).loss, check_device=True
    )


def test_larger_images_have_the_tokens_of_small_ones_and_predictions_are_enlarged():
    old = crate_mae.create_model(NANO, image_size=16, patch_size=4).eval()
    config = resized_config(old.config, (64, 64))
    assert (config.image_size, config.patch_size, config.grid_size) == ((64, 64), 16, (4, 4))
    new = crate_mae.create_model(NANO, image_size=64, patch_size=16).eval()
    torch.nn.init.normal_(old.decoder.pred.bias)
    assert str(start_from(new, old.state_dict())) == "all weights"
    small, large = smooth(16), smooth(64)
    tokens, expected = new.encoder.patch_embed(large), old.encoder.patch_embed(small)
    assert (tokens - expected).std() < 0.15 * expected.std(), (
        "FlexiViT's resampling keeps tokens where images are smooth"
    )
    mask = torch.arange(16)[None].expand(5, -1) % 2 == 0
    predicted, before = (net(each, mask=mask).prediction for net, each in ((new, large), (old, small)))
    shrunk = F.interpolate(unpatchify(predicted, 16, (4, 4)), size=(16, 16), mode="area")
    was = unpatchify(before, 4, (4, 4))
    assert (shrunk - was).std() < 0.5 * was.std()


@pytest.mark.parametrize(("old_channels", "new_channels"), [(3, 1), (1, 3)])
def test_grey_images_look_like_colour_images_of_equal_channels(old_channels, new_channels):
    settings = {"mean": (0.5,), "std": (0.5,)}
    old, new = (
        crate_mae.create_model(NANO, in_chans=c, **{key: value * c for key, value in settings.items()}).eval()
        for c in (old_channels, new_channels)
    )
    assert str(start_from(new, old.state_dict())) == "all weights"
    grey = images(1)
    before, after = (net.encoder(grey.expand(-1, c, -1, -1)) for net, c in ((old, old_channels), (new, new_channels)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_keeps_its_initialisation_and_is_named():
    old = crate_mae.create_model(NANO, depth=2)
    new = crate_mae.create_model(NANO, depth=3, decoder_embed_dim=48)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    found = start_from(new, old.state_dict())
    assert "random initialisation: decoder.blocks.0, " in str(found)
    assert "encoder.blocks.2.ista.dictionary" in found.initialised
    for name, value in new.state_dict().items():
        if name in found.initialised:
            assert torch.equal(value, before[name])
    assert torch.equal(new.encoder.blocks[1].ista.dictionary, old.encoder.blocks[1].ista.dictionary)


def test_a_model_of_another_width_is_refused():
    with pytest.raises(UserError, match="no matrix of its encoder layers fits this model"):
        start_from(crate_mae.create_model(NANO), crate_mae.create_model(NANO, embed_dim=64).state_dict())


def test_patches_that_cannot_be_whole_keep_their_size():
    config = preset("crate_mae_micro_patch4_32")  # 8 x 8 patches
    assert resized_config(config, (64, 64)).patch_size == 8
    assert resized_config(config, (64, 96)).patch_size == 4
    assert resized_config(config, (36, 36)).patch_size == 4
