"""Our ViT-MAE baseline against an independent one: that of the transformers library, with the same weights and masks.

A baseline that is subtly weaker than the published one would make every comparison worthless.
"""

import re

import pytest
import torch

import crate_mae
from crate_mae.costs.memory import LiveTensors
from crate_mae.training.preflight import autocast

transformers = pytest.importorskip("transformers", reason="the transformers library (extra dev) is not installed")

# Distinct everywhere, so that nothing can be taken for something else.
OURS = {
    "embed_dim": 24,
    "num_heads": 3,
    "depth": 3,
    "decoder_embed_dim": 20,
    "decoder_num_heads": 5,
    "decoder_depth": 2,
    "mlp_ratio": 2.0,
}
THEIRS = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "decoder_hidden_size": 20,
    "decoder_num_attention_heads": 5,
    "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 40,
    "image_size": 8,
    "patch_size": 2,
    # The paper's code has 1e-6; the default of transformers, 1e-12, is its own.
    "layer_norm_eps": 1e-6,
}
RENAMED = {
    r"vit\.embeddings\.cls_token": "encoder.cls_token",
    r"vit\.embeddings\.position_embeddings": "encoder.pos_embed",
    r"vit\.embeddings\.patch_embeddings\.projection": "encoder.patch_embed.proj",
    r"vit\.layernorm": "encoder.norm",
    r"vit\.layers": "encoder.blocks",
    r"decoder\.mask_token": "mask_token",
    r"decoder\.decoder_pos_embed": "decoder.pos_embed",
    r"decoder\.decoder_(embed|norm|pred)": r"decoder.\1",
    r"decoder\.decoder_layers": "decoder.blocks",
    r"attention\.o_proj": "attn.proj",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
}


def our_value(name, ours):
    """The tensor of ours that a tensor of theirs stands for: one of query, key and value is a third of our `qkv`."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    third = re.search(r"attention\.([qkv])_proj", name)
    if third:
        stacked = ours.pop(name.replace(third.group(), "attn.qkv")) if third.group(1) == "v" else None
        stacked = ours[name.replace(third.group(), "attn.qkv")] if stacked is None else stacked
        return stacked.chunk(3)["qkv".index(third.group(1))]
    return ours.pop(name)


def with_positions(theirs):
    """Have their own code fill in their tables of positions.

    In a model that transformers 5.23 has just built, these are zeros: it takes them for initialised already.
    """
    for part in (*theirs.modules(), *theirs.parameters()):
        vars(part).pop("_is_hf_initialized", None)
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(num_patches=16)
    assert theirs.vit.embeddings.position_embeddings.any()
    assert theirs.decoder.decoder_pos_embed.any()
    return theirs


@pytest.fixture(params=[False, True], ids=["pixels", "normalised pixels"])
def twins(request):
    """Ours and theirs, with the same random weights in every tensor but the tables of positions."""
    torch.manual_seed(0)
    ours = crate_mae.create_model("vit_mae_nano_patch2_8", norm_pix_loss=request.param, **OURS).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    config = transformers.ViTMAEConfig(norm_pix_loss=request.param, mask_ratio=0.75, **THEIRS)
    theirs = with_positions(transformers.ViTMAEForPreTraining(config)).eval()
    remaining = dict(ours.state_dict())
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            our = our_value(name, remaining)
            if "pos" in name:
                torch.testing.assert_close(value, our, rtol=0, atol=1e-6)
            else:
                value.copy_(our)
    assert not remaining, "some weights of ours have no place in theirs"
    return ours, theirs


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def both(ours, theirs, images):
    """The outputs of both, where both hide the patches with most noise."""
    noise = torch.rand(len(images), 16, generator=torch.Generator().manual_seed(2))
    expected = theirs(pixel_values=images, noise=noise)
    hidden = noise.argsort(dim=1).argsort(dim=1) >= 4
    output = ours(images, mask=hidden)
    assert torch.equal(expected.mask.bool(), hidden)
    return output, expected


def test_loss_and_prediction_are_the_same(twins, images):
    ours, theirs = twins
    output, expected = both(ours, theirs, images)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.prediction, expected.logits, rtol=1e-5, atol=1e-5)
    assert output.prediction.std() > 0.1, "there must be something to compare"


def test_gradients_are_the_same(twins, images):
    ours, theirs = twins
    output, expected = both(ours, theirs, images)
    output.loss.backward()
    expected.loss.backward()
    remaining = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, our_value(name, remaining), rtol=1e-4, atol=1e-5, msg=name)
    assert not remaining


def test_features_of_whole_images_are_the_same(twins, images):
    ours, theirs = twins
    theirs.vit.config.mask_ratio = 0.0
    in_order = torch.arange(16.0).expand(len(images), -1)
    expected = theirs.vit(pixel_values=images, noise=in_order).last_hidden_state
    torch.testing.assert_close(ours.encoder.forward_features(images), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_epsilon_would_be_seen(twins, images):
    ours, theirs = twins
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2
    output, expected = both(ours, theirs, images)
    assert (output.prediction - expected.logits).abs().max() > 1e-4


@pytest.mark.parametrize(("precision", "kernel"), [("float32", True), ("bfloat16", False)])
def test_attention_takes_the_faster_form_on_a_processor(precision, kernel):
    model = crate_mae.create_model("vit_mae_nano_patch2_8")
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        model.encoder.forward_features(torch.randn(1, 3, 8, 8))
    assert {block.attn.fused_attn for block in model.encoder.blocks} == {kernel}


def test_attention_of_the_baseline_holds_no_square_of_tokens():
    model = crate_mae.create_model("vit_mae_nano_patch2_8", image_size=(64, 64), depth=1)
    images = torch.randn(1, 3, 64, 64)
    tokens, heads = 1 + 32**2, 4
    with LiveTensors() as live:
        model.encoder.forward_features(images).sum().backward()
    assert live.peak < heads * tokens**2 * 4
