"""Number for number the official model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import crate_mae
from benchmarks import reference
from crate_mae.theory.attention import attention_membership

OWN = Path(__file__).resolve().parents[1] / "golden" / "crate_mae_reference.safetensors"


@pytest.fixture(params=["own", "official"])
def golden(request):
    """Stored outputs: of our reference implementation, always; of the official code, where the shared folder is."""
    if request.param == "own":
        tensors, heads, size = load_file(OWN), 7, (15, 25)
    else:
        shared = request.getfixturevalue("shared")
        tensors, heads, size = load_file(shared / "golden" / "crate_mae_official.safetensors"), 4, None
    state = {name.removeprefix("official."): value for name, value in tensors.items() if name.startswith("official.")}
    return tensors, state, heads, size


def build(golden, **settings):
    _, state, heads, size = golden
    return crate_mae.from_official(state, num_heads=heads, image_size=size, **settings).eval()


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_masked_outputs_are_the_stored_ones(golden):
    tensors, mask = golden[0], golden[0]["mask"].bool()
    model = build(golden)
    layers = ["encoder.blocks.?", "decoder.blocks.?"]
    with crate_mae.trace(model, layers) as record:
        output = model(tensors["images"], mask=mask)
    assert_near(output.loss, tensors["loss"])
    assert_near(output.prediction, tensors["pred"])
    assert_near(output.latent, tensors["latent"])
    assert torch.equal(output.mask, mask)
    for side, short in (("encoder", "enc"), ("decoder", "dec")):
        stored = [name for name in tensors if name.startswith(f"{short}.")]
        assert len(stored) == len(getattr(model, side).blocks)
        for i in range(len(stored)):
            assert_near(record[f"{side}.blocks.{i}"][0], tensors[f"{short}.{i}"])
    assert_near(build(golden, norm_pix_loss=True)(tensors["images"], mask=mask).loss, tensors["loss_norm_pix"])


@torch.no_grad()
def test_unmasked_features_and_attention_maps_are_the_stored_ones(golden):
    tensors = golden[0]
    model = build(golden)
    with crate_mae.trace(model.encoder, ["blocks.*.attn.subspaces"]) as record:
        assert_near(model.encoder.forward_features(tensors["images"]), tensors["feat"])
    # The stored maps of the official code are of unmasked images, those of our own file of masked ones.
    if golden[3] is not None:
        with crate_mae.trace(model.encoder, ["blocks.*.attn.subspaces"]) as record:
            model(tensors["images"], mask=tensors["mask"].bool())
    for i, block in enumerate(model.encoder.blocks):
        w = record[f"blocks.{i}.attn.subspaces"][0].unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        assert_near(attention_membership(w), tensors[f"attn.{i}"])


def test_round_trip_gives_back_the_same_tensors(golden):
    state = golden[1]
    back = crate_mae.to_official(build(golden))
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


def test_the_reference_form_computes_what_the_official_code_stored(golden):
    tensors, state, heads, _ = golden
    results = reference.forward(state, tensors["images"], tensors["mask"].bool(), heads)
    for name in ("loss", "loss_norm_pix", "pred", "latent"):
        assert_near(results[name], tensors[name])


def test_gradients_are_those_of_the_reference_form(golden):
    tensors, state, heads, _ = golden
    model = build(golden).double()
    mask = tensors["mask"].bool()
    images = tensors["images"].double()
    model(images, mask=mask).loss.backward()
    leaves = {name: value.double().requires_grad_() for name, value in state.items()}
    reference.forward(leaves, images, mask, heads)["loss"].backward()
    ours = crate_mae.to_official(model)
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = grads[name]
    ours = crate_mae.to_official(model)
    compared = 0
    for name, leaf in leaves.items():
        if leaf.grad is not None and "pos_embed" not in name:
            torch.testing.assert_close(ours[name], leaf.grad, rtol=1e-10, atol=1e-12)
            compared += 1
    assert compared == len(grads)


def test_files_with_a_wrapper_and_prefixes_are_read(tmp_path):
    tensors = load_file(OWN)
    state = {f"module.{n.removeprefix('official.')}": v for n, v in tensors.items() if n.startswith("official.")}
    torch.save({"model": state, "epoch": 7}, tmp_path / "official.pth")
    model = crate_mae.from_official(tmp_path / "official.pth", num_heads=7, image_size=(15, 25))
    assert_near(model(tensors["images"], mask=tensors["mask"].bool()).loss, tensors["loss"])


def test_what_is_not_official_is_named(tmp_path):
    state = {n.removeprefix("official."): v for n, v in load_file(OWN).items() if n.startswith("official.")}
    with pytest.raises(crate_mae.UserError, match="15 patches, not a square"):
        crate_mae.from_official(state, num_heads=7)
    del state["blocks.1.layers.0.1.fn.weight"]
    with pytest.raises(crate_mae.UserError, match=r"blocks\.1\.layers\.0\.1\.fn\.weight is missing"):
        crate_mae.from_official(state, num_heads=7, image_size=(15, 25))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(crate_mae.UserError, match="is not an official CRATE-MAE"):
        crate_mae.from_official(tmp_path / "other.safetensors", num_heads=7)


@pytest.mark.parametrize(
    "settings",
    [
        {"ista_skip": True},
        {"threshold": 0.1},
        {"step_size": 0.3},
        {"output_projection": "tied"},
        {"mask_tokens": "decoder"},
        {"decoder_num_heads": 2},
        {"decoder_embed_dim": 48},
    ],
    ids=str,
)
def test_only_the_published_model_has_an_official_form(settings):
    model = crate_mae.create_model("crate_mae_nano_patch2_8", **settings)
    with pytest.raises(crate_mae.UserError, match="no official form"):
        crate_mae.to_official(model)
