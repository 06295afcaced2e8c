"""What the isometric initialisation promises: the same model, whose tokens do not collapse before it has learned."""

import pytest
import torch

from crate_mae import create_model
from crate_mae.models.initialization import ISOMETRIC_GAIN
from crate_mae.theory import token_diversity

SMALL = "crate_mae_nano_patch2_8"


def built(init, **settings):
    torch.manual_seed(3)
    return create_model(SMALL, init=init, **settings).eval()


def test_only_output_projections_and_decoder_dictionaries_differ():
    official, isometric = built("official").state_dict(), built("isometric").state_dict()
    assert official.keys() == isometric.keys()
    for name, value in official.items():
        if name.endswith("attn.proj.weight"):
            # Orthogonal matrices take other random numbers, so what is drawn after the first of them differs too.
            bound = (6 / sum(value.shape)) ** 0.5 * ISOMETRIC_GAIN
            assert 0.9 * bound < isometric[name].abs().max() <= bound
        elif name.startswith("decoder") and name.endswith("dictionary.weight"):
            torch.testing.assert_close(isometric[name].T @ isometric[name], torch.eye(len(value)), atol=1e-5, rtol=0)
        elif name.startswith("encoder"):
            torch.testing.assert_close(isometric[name], value)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_tokens_keep_their_places_through_all_layers(mask_tokens):
    images = torch.randn(4, 1, 8, 8).cumsum(-1)
    last = {}
    for init in ("official", "isometric"):
        model = built(init, in_chans=1, mask_tokens=mask_tokens, depth=12, decoder_depth=12)
        tokens = []
        handle = model.decoder.blocks[-1].register_forward_hook(lambda *call, kept=tokens: kept.append(call[2]))
        with torch.no_grad():
            model(images)
        handle.remove()
        last[init] = float(token_diversity(tokens[0][:, 1:]))
    assert last["isometric"] > 5 * last["official"]


def test_timm_can_reset_the_weights_the_same_way():
    encoder = built("isometric").encoder
    encoder.init_weights()
    attn = encoder.blocks[0].attn
    gain = float(attn.proj.weight.detach().std() / attn.subspaces.weight.detach().std())
    assert gain == pytest.approx(ISOMETRIC_GAIN, rel=0.05)
