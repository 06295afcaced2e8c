"""The encoder as the backbone that timm promises."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

import crate_mae
from crate_mae.models.initialization import sincos_positions

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture(params=["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])
def encoder(request):
    torch.manual_seed(2)
    return crate_mae.create_model(request.param, **SMALL).encoder.eval()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_features_are_the_token_sequence_class_token_first(encoder):
    assert isinstance(encoder, VisionTransformer)
    features = encoder.forward_features(IMAGES)
    assert features.shape == (2, 17, 24)
    assert encoder.num_prefix_tokens == 1
    torch.testing.assert_close(encoder(IMAGES), features[:, 0])


def test_intermediates_end_in_the_features(encoder):
    final, layers = encoder.forward_intermediates(IMAGES, indices=[0, 1, 2], output_fmt="NLC", norm=True)
    torch.testing.assert_close(final, encoder.forward_features(IMAGES))
    torch.testing.assert_close(layers[-1], final[:, 1:])
    maps = encoder.forward_intermediates(IMAGES, indices=2, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2


def test_a_classifier_can_be_put_on_and_pools_as_asked(encoder):
    encoder.reset_classifier(7)
    assert encoder(IMAGES).shape == (2, 7)
    encoder.reset_classifier(7, global_pool="avg")
    pooled = encoder.forward_features(IMAGES)[:, 1:].mean(1)
    torch.testing.assert_close(encoder.forward_head(encoder.forward_features(IMAGES), pre_logits=True), pooled)
    assert encoder.get_classifier().out_features == 7


def test_gradient_checkpointing_changes_nothing(encoder):
    encoder.train()
    plain = encoder(IMAGES)
    encoder.set_grad_checkpointing()
    torch.testing.assert_close(encoder(IMAGES), plain)


def test_layer_decay_groups_are_found(encoder):
    groups = param_groups_layer_decay(encoder, layer_decay=0.5)
    assert (
        len({group["lr_scale"] for group in groups}) == 1 + 3
    )  # the stem, and three blocks of which the last takes the norm


def test_another_input_size_keeps_positions_a_buffer(encoder):
    names = [name for name, _ in encoder.named_parameters()]
    encoder.set_input_size((12, 6))
    assert encoder.forward_features(torch.randn(2, 3, 12, 6)).shape == (2, 19, 24)
    assert [name for name, _ in encoder.named_parameters()] == names
    assert encoder.pos_embed.shape == (1, 19, 24)


def test_positions_by_hand():
    table = sincos_positions(8, (2, 3))
    assert table.shape == (7, 8)
    assert torch.equal(table[0], torch.zeros(8))  # the class token
    # Row 1, column 2, frequencies 1 and 0.01: columns first, sines before cosines.
    x, y = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    torch.testing.assert_close(table[6], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
    with pytest.raises(crate_mae.UserError, match="multiple of 4"):
        sincos_positions(10, (2, 3))
