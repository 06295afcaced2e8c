"""Features: which tokens, of which layer, of which images, and that they are always the same."""

import inspect

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import crate_mae
from crate_mae.errors import UserError
from crate_mae.models.features import (
    DEFAULT_LAYER,
    DEFAULT_POOLING,
    default_pooling,
    depth,
    encode,
    encode_layers,
    evaluating,
    pool,
)

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return crate_mae.create_model("crate_mae_nano_patch2_8", **SMALL).eval()


@pytest.fixture
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pictures(images):
    return [Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()) for image in images]


def test_pooling_by_hand():
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 60.0]], [[3.0, 30.0], [5.0, 50.0], [5.0, 70.0]]])
    assert pool(tokens, 1, "cls").tolist() == [[1, 10], [3, 30]]
    assert pool(tokens, 1, "mean").tolist() == [[3, 40], [5, 60]]
    assert pool(tokens, 1, "cls+mean").tolist() == [[1, 10, 3, 40], [3, 30, 5, 60]]
    assert pool(tokens, 1, "tokens").tolist() == tokens[:, 1:].tolist()
    # Of two prefix tokens only the first is the class token, and neither is a patch.
    assert pool(tokens, 2, "cls+mean").tolist() == [[1, 10, 4, 60], [3, 30, 5, 70]]
    assert pool(tokens, 0, "mean")[0].tolist() == pytest.approx([7 / 3, 30])


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
def test_without_a_class_token_there_is_none_to_take(pooling):
    with pytest.raises(UserError, match="no class token"):
        pool(torch.zeros(2, 3, 5), 0, pooling)
    swin_like = timm.create_model("test_convnext", num_classes=0)
    with pytest.raises(UserError, match="no class token"):
        encode(swin_like, torch.zeros(1, 3, 64, 64), pooling=pooling)


def test_an_unknown_pooling_is_named():
    with pytest.raises(UserError, match='pooling is "max", but must be one of cls, mean, cls\\+mean, tokens'):
        inspect.unwrap(pool)(torch.zeros(2, 3, 5), 1, "max")  # past the tests' check of types


def test_the_last_layer_is_forward_features_and_the_others_have_its_norm(model, images):
    encoder = model.encoder
    with evaluating(encoder):
        last = encode(encoder, images, -1, "tokens")
        torch.testing.assert_close(last, encoder.forward_features(images)[:, 1:], rtol=0, atol=0)
        z = encoder._pos_embed(encoder.patch_embed(images))
        for layer, block in enumerate(encoder.blocks):
            z = block(z)
            expected = encoder.norm(z)
            torch.testing.assert_close(encode(encoder, images, layer, "tokens"), expected[:, 1:])
            torch.testing.assert_close(encode(encoder, images, layer - 3, "cls"), expected[:, 0])


def test_all_layers_in_one_pass_are_those_of_each(model, images):
    with evaluating(model.encoder):
        together = encode_layers(model.encoder, images, [2, 0, -2])
        for layer, features in zip([2, 0, -2], together, strict=True):
            torch.testing.assert_close(features, encode(model.encoder, images, layer))


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_that_does_not_exist_is_a_sentence_with_the_range(model, images, layer):
    with pytest.raises(UserError, match=f"There is no layer {layer}: this encoder has 3 layers, 0 to 2, or -1 to -3"):
        model.embed(images, layer=layer)


@pytest.mark.parametrize(
    ("name", "options", "pooling", "widths"),
    [
        ("test_vit", {"img_size": 32}, "cls+mean", [128] * 6),
        ("test_resnet", {}, "mean", [32, 48, 192, 96]),
        ("test_convnext", {}, "mean", [24, 32, 48, 64]),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "depth": 2}, "mean", [192] * 2),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "depth": 2}, "cls+mean", [384] * 2),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "img_size": 56}, "mean", [96, 192]),
    ],
    ids=["vit", "resnet", "convnext", "vit without class token", "vit with registers", "swin"],
)
def test_any_timm_network_gives_features_of_every_layer(name, options, pooling, widths):
    encoder = timm.create_model(name, num_classes=0, **options)
    size = options.get("img_size", 224 if "patch16" in name else 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert default_pooling(encoder) == pooling
    with evaluating(encoder):
        layers = encode_layers(encoder, x, range(depth(encoder)))
        tokens = encode(encoder, x, pooling="tokens")
        last = encode(encoder, x)
        first = encode(encoder, x, 0)
    assert [layer.shape[1] for layer in layers][-len(widths) :] == widths
    assert all(layer.shape[0] == 2 and torch.isfinite(layer).all() for layer in layers)
    torch.testing.assert_close(layers[-1], last)
    torch.testing.assert_close(layers[0], first)
    torch.testing.assert_close(last[:, -tokens.shape[2] :], tokens.mean(dim=1))


def test_a_feature_map_is_flattened_with_channels_last():
    encoder = timm.create_model("test_convnext", num_classes=0).eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with evaluating(encoder):
        tokens = encode(encoder, x, pooling="tokens")
        grid = encoder.forward_features(x)
    assert tokens.shape == (2, grid.shape[2] * grid.shape[3], grid.shape[1])
    torch.testing.assert_close(tokens[1, grid.shape[3] + 1], grid[1, :, 1, 1])


def test_embedding_is_bit_equal_on_repeat_and_independent_of_the_batch(model, images):
    features = model.embed(images)
    assert features.shape == (5, 48)
    assert features.dtype == torch.float32
    assert torch.equal(features, model.embed(images))
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(features, model.embed(images, batch_size=batch_size), rtol=0, atol=1e-5)


def test_embedding_takes_images_in_every_form(model, images, tmp_path):
    levels = [np.asarray(picture) for picture in pictures(images)]
    expected = model.embed(levels)
    for i, picture in enumerate(pictures(images)):
        picture.save(tmp_path / f"{i} ü.png")
    paths = [tmp_path / f"{i} ü.png" for i in range(5)]
    tensors = [torch.from_numpy(level.copy()).permute(2, 0, 1) for level in levels]
    for form in (
        paths,
        [str(path) for path in paths],
        pictures(images),
        tuple(level.astype(np.float32) / 255 for level in levels),
        tensors,
        torch.stack(tensors),
        np.stack(levels),
        torch.stack(tensors) / 255,
        [paths[0], tensors[1], levels[2], pictures(images)[3], str(paths[4])],
    ):
        torch.testing.assert_close(model.embed(form), expected, rtol=0, atol=1e-5)
    for one in (paths[2], str(paths[2]), levels[2], tensors[2], pictures(images)[2]):
        torch.testing.assert_close(model.embed(one), expected[2:3], rtol=0, atol=1e-5)


def test_images_are_prepared_as_in_evaluation(model):
    wide = torch.rand(3, 11, 17, generator=torch.Generator().manual_seed(3))
    c = model.config
    prepared = crate_mae.data.transforms.evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)(wide)
    with torch.no_grad():
        tokens = model.encoder.forward_features(prepared[None])
    torch.testing.assert_close(model.embed(wide, pooling="mean"), tokens[:, 1:].mean(dim=1), rtol=0, atol=1e-5)
    grey = np.full((9, 7), 0.5)
    torch.testing.assert_close(model.embed(grey), model.embed(np.stack([grey] * 3, axis=2)), rtol=0, atol=1e-5)


def test_embedding_leaves_the_model_as_it_was(model, images):
    model.train()
    model.encoder.blocks[1].eval()
    before = [module.training for module in model.modules()]
    features = model.embed(images)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(features, model.eval().embed(images))
    torch.nn.Linear(48, 2)(features).sum().backward()  # features can be trained on


def test_stochastic_depth_does_not_reach_features(images):
    torch.manual_seed(0)
    model = crate_mae.create_model("crate_mae_nano_patch2_8", drop_path=0.9, **SMALL).train()
    assert torch.equal(model.embed(images), model.embed(images))


def test_mixed_precision_around_it_changes_nothing(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.embed(images)
    assert torch.equal(features, model.embed(images))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "no images to embed"),
        (["missing.png"], "missing.png cannot be read: no such file"),
        (torch.zeros(2, 7, 8, 8), "images have 7 channel"),
        (torch.full((3, 8, 8), 2.0), "a float image is in \\[0, 1\\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "an image is uint8, uint16, or float"),
    ],
)
def test_what_is_no_image_is_named(model, images, words):
    with pytest.raises(UserError, match=words):
        model.embed(images)


def test_damaged_files_and_folders_are_named(model, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"cut\.png cannot be read: not an image"):
        model.embed(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"is a folder. For all its images: crate_mae\.embed"):
        model.embed([tmp_path])
    with pytest.raises(UserError, match="batch_size is 0"):
        model.embed(torch.zeros(3, 8, 8), batch_size=0)


def test_the_defaults_are_those_that_help_texts_name():
    for name in ("embed", "eval_knn", "eval_linear", "eval_fewshot"):
        text = " ".join(getattr(crate_mae, name).__doc__.split())
        assert f"by default {DEFAULT_POOLING}, or mean" in text, name
        last = f"by default {DEFAULT_LAYER}." if name in ("embed", "eval_fewshot") else f"otherwise {DEFAULT_LAYER}."
        assert last in text, name
