"""Attention is taken out and put back, whatever happens meanwhile, and what is lost is paired over images."""

import pytest
import torch

from crate_mae.evaluation.probes import Score
from crate_mae.interpret.removals import attention_use, without_mixing


def test_tokens_are_not_mixed_and_the_layer_is_as_it_was(build, images):
    model = build()
    layer = model.encoder.blocks[1]
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = layer(x)
        with without_mixing([layer]):
            alone = layer(x)
            single = layer(x[:, 2:3])
        torch.testing.assert_close(alone[:, 2:3], single)  # no other token is read
        assert not torch.allclose(before, alone)
        torch.testing.assert_close(layer(x), before)


def test_it_is_undone_after_an_exception(build):
    model = build()
    with pytest.raises(RuntimeError, match="stop"), without_mixing(model.encoder.blocks):
        raise RuntimeError("stop")
    vit = build("vit_mae_nano_patch2_8").encoder.blocks[0]
    with pytest.raises(AssertionError), without_mixing([model.encoder.blocks[0], vit]):
        pass
    assert not any(module._forward_hooks for module in (*model.modules(), *vit.modules()))


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_losses_are_those_of_the_model_and_changes_are_paired(build, images, mask_tokens):
    model = build(mask_tokens=mask_tokens)
    mask = torch.zeros(7, 16, dtype=torch.bool)
    mask[:, ::2] = True
    scores = iter(Score(share, 0.0, 1.0) for share in (0.5, 0.4, 0.3, 0.2))
    found = attention_use(model, images, mask, probe=lambda: next(scores), batch_size=3)
    assert [(use.part, use.layer) for use in found] == [
        ("", None),
        *(("encoder", layer) for layer in (0, 1, None)),
        *(("decoder", layer) for layer in (0, 1, None)),
    ]
    with torch.no_grad():
        assert found[0].loss == pytest.approx(float(model(images, mask=mask).loss), rel=1e-5)
        with without_mixing(model.encoder.blocks):
            assert found[3].loss == pytest.approx(float(model(images, mask=mask).loss), rel=1e-5)
    assert found[3].change == pytest.approx(found[3].loss - found[0].loss)
    assert found[3].change_low < found[3].change < found[3].change_high
    assert [use.accuracy for use in found] == [0.5, 0.4, 0.3, 0.2, None, None, None]


def test_a_vit_has_no_such_attention(build, images):
    assert attention_use(build("vit_mae_nano_patch2_8"), images, torch.ones(7, 16, dtype=torch.bool)) == []
