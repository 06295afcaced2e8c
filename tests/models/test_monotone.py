"""Monotone layers keep their guarantees with any weights, tokens and optimizer, or refuse the weights."""

import copy
import itertools
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import crate_mae
from crate_mae.errors import UserError
from crate_mae.models.monotone import (
    MOST_SCALE,
    BoundedISTA,
    Compression,
    Decompression,
    MonotoneDecoderLayer,
    MonotoneEncoderLayer,
    OrthogonalSubspaces,
    check_monotone,
    retract_,
)
from crate_mae.models.timm_models import write_encoder
from crate_mae.theory.coding_rate import subspace_coding_rate
from crate_mae.theory.compression import balanced_membership
from crate_mae.theory.sparse_coding import lasso_objective, sparse_codes
from crate_mae.theory.subspaces import distance_from_orthogonal

NANO = "crate_mae_nano_visible_patch2_8"
TINY = {"layer": "monotone", "embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 2}
WIDTH, HEADS = 20, 5
EPS = (0.05, 0.5, 5.0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def anything(module, generator, size=1.0):
    """Weights of no particular kind, such as no training would make."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(
                parameter + 0.03 * noise if parameter.ndim == 2 and "dictionary" not in name else size * noise
            )
    return module


def hostile_tokens(generator, n=11):
    z = torch.randn(4, n, WIDTH, generator=generator, dtype=torch.float64)
    z[1] *= torch.exp(4 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 2)
    z[2] += 5 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    z[3] = z[3, :1]
    return z


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_no_rate_rises_in_the_encoders_step_and_none_falls_in_the_decoders(size, generator):
    for _ in range(20):
        encoder = anything(MonotoneEncoderLayer(WIDTH, HEADS).double(), generator, size).eval()
        decoder = anything(MonotoneDecoderLayer(WIDTH, HEADS).double(), generator, size).eval()
        x = hostile_tokens(generator)
        for layer, sign in ((encoder, 1), (decoder, -1)):
            u = layer.attn.bases()
            after = x + sign * layer.attn(x)
            for eps in EPS:
                change = subspace_coding_rate(after, u, eps) - subspace_coding_rate(x, u, eps)
                assert (sign * change <= 1e-9).all()


def test_a_layer_starts_its_step_from_normalised_tokens(generator):
    layer = anything(MonotoneEncoderLayer(WIDTH, HEADS).double(), generator).eval()
    z = hostile_tokens(generator)
    x = layer.norm1(z)
    code = layer.ista(layer.norm2(x + layer.attn(x)))
    torch.testing.assert_close(layer(z), code)
    layer = anything(MonotoneDecoderLayer(WIDTH, HEADS).double(), generator).eval()
    x = layer.norm2(layer.dictionary(layer.norm1(z)))
    torch.testing.assert_close(layer(z), x - layer.attn(x))


def test_the_step_is_its_formula(generator):
    attn = anything(Compression(WIDTH, HEADS).double(), generator).eval()
    x, expected = hostile_tokens(generator), 0
    for k, u in enumerate(attn.bases()):
        w = x @ u
        b = balanced_membership(w, float(attn.log_scale[k].detach().exp()))
        torch.testing.assert_close(attn.membership(attn.project(x))[:, k], b)
        expected = expected + (1 + attn.excess_logit[k].sigmoid()) / 2 * (b @ w - w) @ u.mT
    torch.testing.assert_close(attn(x), expected)
    reverse = Decompression(WIDTH, HEADS).double().eval()
    reverse.load_state_dict(
        {name.replace("excess_logit", "log_rate"): value for name, value in attn.state_dict().items()}
    )
    ratio = (attn.excess_logit.exp() / attn.rate().flatten()).repeat_interleave(WIDTH // HEADS)
    u = attn.subspaces.matrix().mT
    torch.testing.assert_close(reverse(x) @ u, ratio * (expected @ u))


def test_the_decoder_starts_with_steps_that_the_encoder_cannot_take():
    encoder, decoder = (kind(WIDTH, HEADS).rate().flatten().tolist() for kind in (Compression, Decompression))
    assert encoder == pytest.approx([0.75] * HEADS)
    assert decoder == pytest.approx([2.5] * HEADS)


@pytest.mark.parametrize("training", [True, False])
def test_no_code_is_worse_than_none(training, generator):
    for size in (0.01, 1.0, 100.0):
        ista = anything(BoundedISTA(WIDTH, step_size=0.3, threshold=0.2).double(), generator, size).train(training)
        x, d = hostile_tokens(generator), ista.lasso_dictionary()
        codes = ista(x)
        assert (codes >= 0).all()
        bound = 1.05 if training else 1 + 1e-9
        assert 0.3 * torch.linalg.matrix_norm(d, ord=2) ** 2 <= bound**2
        for x_i, a_i in zip(x.flatten(0, 1), codes.flatten(0, 1), strict=True):
            assert lasso_objective(a_i, x_i, d, 0.2) <= lasso_objective(0 * a_i, x_i, d, 0.2) + 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_of_sparse_coding_are_those_of_the_theory_and_each_lowers_the_objective(steps, generator):
    ista = anything(BoundedISTA(WIDTH, step_size=0.3, threshold=0.2, steps=steps).double(), generator).eval()
    x, d = hostile_tokens(generator), ista.lasso_dictionary()
    expected = sparse_codes(x, d, 0.3, 0.2, steps)
    torch.testing.assert_close(ista(x), expected)
    torch.testing.assert_close(ista.preactivation(x).relu(), expected)
    torch.testing.assert_close(ista.folded()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(ista(x), expected)  # with its matrices kept
        ista.dictionary.mul_(0.5)
        torch.testing.assert_close(ista(x), sparse_codes(x, ista.lasso_dictionary(), 0.3, 0.2, steps))
    before = sparse_codes(x, d, 0.3, 0.2, steps - 1) if steps > 1 else torch.zeros_like(expected)
    for x_i, a_i, b_i in zip(*(each.flatten(0, 1) for each in (x, expected, before)), strict=True):
        assert lasso_objective(a_i, x_i, d, 0.2) <= lasso_objective(b_i, x_i, d, 0.2) + 1e-12


def test_the_first_code_is_the_exact_minimum_of_its_lasso(generator):
    ista = BoundedISTA(WIDTH, step_size=0.3, threshold=0.2).double().eval()
    x = hostile_tokens(generator)
    code, d = ista(x), ista.lasso_dictionary()
    correlation = (x - code @ d.mT) @ d  # minus the gradient: lambda where a code is active, at most that elsewhere
    torch.testing.assert_close(correlation[code > 0], torch.full_like(correlation[code > 0], 0.2), rtol=1e-3, atol=0)
    assert (correlation[code == 0] <= 0.2 + 1e-4).all()


class Careless(torch.optim.Optimizer):
    """Anybody's optimizer: large steps, written past autograd's knowledge."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.sign(), alpha=-0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        Careless,
    ],
    ids=["sgd", "fused", "decaying", "careless"],
)
def test_subspaces_stay_orthogonal_under_any_optimizer(optimizer):
    torch.manual_seed(0)
    model = crate_mae.create_model(NANO, **TINY).train()
    stepping = optimizer(model.parameters())
    images = torch.randn(6, 3, 8, 8)
    subspaces = [m for m in model.modules() if isinstance(m, OrthogonalSubspaces)]
    assert len(subspaces) == 4
    for _ in range(30):
        model(images, mask_ratio=0.5).loss.backward()
        assert max(float(distance_from_orthogonal(m.matrix().detach())) for m in subspaces) < 0.02
        stepping.step()
        stepping.zero_grad()
    model.eval()
    assert max(float(distance_from_orthogonal(m.matrix().detach())) for m in subspaces) < 1e-5


@pytest.mark.parametrize("size", [0.003, 0.1, 1.0, 100.0])
def test_no_rate_rises_in_training_after_a_step_of_any_size(size, generator):
    layer = MonotoneEncoderLayer(WIDTH, HEADS).double().train()
    for _ in range(5):
        step = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).sign()
        with torch.no_grad():
            layer.attn.subspaces.weight.add_(step, alpha=size)
        x = hostile_tokens(generator)
        after = x + layer.attn(x)
        assert distance_from_orthogonal(layer.attn.subspaces.weight.detach()) < 0.01
        for eps in EPS:
            change = subspace_coding_rate(after, layer.attn.bases(), eps) - subspace_coding_rate(
                x, layer.attn.bases(), eps
            )
            assert (change <= 1e-9).all()


def test_weights_that_are_not_finite_stay_so_in_training(generator):
    layer = MonotoneEncoderLayer(WIDTH, HEADS).train()
    with torch.no_grad():
        layer.attn.subspaces.weight[0, 0] = torch.nan
    assert layer(hostile_tokens(generator).float()).isnan().any()  # which a training loop sees in its loss


def test_a_weight_is_re_orthogonalised_once_for_each_change(generator):
    subspaces = anything(OrthogonalSubspaces(WIDTH), generator)
    x = torch.randn(2, 3, WIDTH, generator=generator)
    first, second = subspaces(x), subspaces(x)  # the graph of the first stays valid
    (first.square().sum() + second.sum()).backward()
    before = subspaces.weight.detach().clone()
    subspaces(x)
    assert torch.equal(subspaces.weight, before)
    retract_(subspaces)
    after = subspaces.weight.detach().clone()
    assert not torch.equal(after, before)
    with torch.no_grad():
        subspaces.weight.mul_(0.9)
    subspaces(x)
    torch.testing.assert_close(subspaces.weight, 0.9 * after)  # a loop that calls retract_ goes on to call it


def test_averages_and_half_precision_are_orthogonal_in_eval_mode(generator):
    a, b = (OrthogonalSubspaces(WIDTH) for _ in range(2))
    b.load_state_dict(a.state_dict())
    anything(b, generator)
    average = copy.deepcopy(a)
    with torch.no_grad():
        average.weight.copy_((a.weight + b.weight) / 2)
    for each in (average.eval(), average.to(torch.bfloat16).eval()):
        u = each.matrix().double()
        assert distance_from_orthogonal(u) < (1e-6 if each.weight.dtype == torch.float32 else 1e-2)


def test_in_eval_mode_gradients_still_reach_the_weights(generator):
    layer = MonotoneEncoderLayer(WIDTH, HEADS).eval()
    layer(hostile_tokens(generator).float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_stochastic_depth_does_not_enlarge_the_step(generator):
    layer = MonotoneEncoderLayer(WIDTH, HEADS, drop_path=0.5).train()
    x = torch.ones(64, 1, 1)
    assert set(layer.drop_path(x).flatten().tolist()) == {0.0, 1.0}


def saved(tmp_path, change=None, **settings):
    model = crate_mae.create_model(NANO, **(TINY | settings))
    if change is not None:
        with torch.no_grad():
            change(model)
    crate_mae.save(model, tmp_path)
    return model.eval()


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = saved(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    found = crate_mae.load(tmp_path)
    assert torch.equal(found.encoder.forward_features(images), model.encoder.forward_features(images))
    assert found.config.layer == "monotone"


def test_subspaces_far_from_orthogonal_are_refused(tmp_path):
    saved(tmp_path, lambda model: model.encoder.blocks[1].attn.subspaces.weight.normal_(0, 0.2))
    with pytest.raises(UserError, match=r"encoder\.blocks\.1\.attn\.subspaces: .* far from orthogonal"):
        crate_mae.load(tmp_path)


def test_a_temperature_beyond_computing_is_refused(tmp_path):
    model = saved(tmp_path, lambda model: model.decoder.blocks[0].attn.log_scale.fill_(200))
    with pytest.raises(UserError, match=r"decoder\.blocks\.0\.attn\.log_scale is 200 at most"):
        crate_mae.load(tmp_path)
    saved(tmp_path, lambda model: model.decoder.blocks[1].attn.log_rate.fill_(30))
    with pytest.raises(UserError, match=r"decoder\.blocks\.1\.attn\.log_rate is 30 at most, a step size beyond 10000"):
        crate_mae.load(tmp_path)
    with torch.no_grad():
        model.decoder.blocks[0].attn.log_scale.fill_(float("nan"))
    with pytest.raises(UserError, match="log_scale"):
        check_monotone(model)
    assert torch.tensor(MOST_SCALE).log() > 9


@pytest.mark.parametrize(
    ("layer", "other"),
    list(itertools.permutations(("published", "compressing", "monotone"), 2)),
)
def test_weights_of_the_other_kind_of_layers_are_refused(tmp_path, layer, other):
    saved(tmp_path, layer=layer)
    with pytest.raises(UserError, match=f"holds {layer} layers; {other} ones compute another function"):
        crate_mae.load(tmp_path, layer=other)


def test_a_description_of_other_layers_than_the_weights_is_refused(tmp_path):
    saved(tmp_path, layer="published")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"layer": "published"', '"layer": "compressing"'))
    with pytest.raises(UserError, match=r"holds the weights of published layers, but .* describe compressing or mon"):
        crate_mae.load(tmp_path)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_step_size_that_is_not_finite_is_refused(tmp_path, side):
    model = crate_mae.create_model(NANO, **TINY)
    with torch.no_grad():
        attn = getattr(model, side).blocks[0].attn
        attn.get_parameter(attn.RATE)[1] = float("nan")
    with pytest.raises(
        UserError, match=rf"{side}\.blocks\.0\.attn\.(excess_logit|log_rate) has values that are not finite"
    ):
        check_monotone(model)


def test_weights_of_earlier_monotone_layers_are_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.replace("excess_logit", "rate_logit"): value for name, value in tensors.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="earlier version, which allowed kappa below 1/2"):
        crate_mae.load(tmp_path)


def test_files_that_do_not_say_how_many_steps_they_take_take_one(tmp_path):
    model = saved(tmp_path, ista_steps=1).eval()
    timm_folder = tmp_path / "timm"
    timm_folder.mkdir()
    write_encoder(model, timm_folder)
    images = torch.rand(2, 3, 8, 8)
    expected = model.encoder.forward_features(images)
    for folder in (tmp_path, timm_folder):
        config = folder / "config.json"
        text = config.read_text()
        config.write_text(re.sub(r'\s*"ista_steps": 1,', "", text))
        assert "ista_steps" in text and "ista_steps" not in config.read_text()
    found = crate_mae.load(tmp_path).eval()
    assert torch.equal(found.encoder.forward_features(images), expected)
    assert torch.equal(crate_mae.load(tmp_path, ista_steps=1).eval().encoder.forward_features(images), expected)
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    assert torch.equal(theirs.forward_features(images), expected)
    assert not torch.equal(crate_mae.load(tmp_path, ista_steps=2).eval().encoder.forward_features(images), expected)


def test_the_usual_number_of_steps_belongs_to_the_kind_of_layers(tmp_path):
    config = crate_mae.create_model(NANO, **TINY).config
    assert config.ista_steps == 2
    assert [config.replace(layer=layer).ista_steps for layer in ("published", "compressing", "monotone")] == [1, 1, 2]
    assert config.replace(layer="published").replace(layer="monotone", ista_steps=3).ista_steps == 3
    with pytest.raises(UserError, match="ista_steps is 2, but only monotone layers take more than one"):
        config.replace(layer="compressing", ista_steps=2)
    with pytest.raises(UserError, match="ista_steps is -1, but must be at least 1"):
        config.replace(ista_steps=-1)
    model = crate_mae.create_model(NANO, **TINY)
    model.encoder.blocks[0].ista.steps = 4
    with pytest.raises(UserError, match=r"blocks\.0\.ista\.steps of this model is 4, but its config describes 2"):
        crate_mae.save(model, tmp_path)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="monotone layers have no ista_skip and no overcomplete"):
        crate_mae.create_model(NANO, **TINY, ista_skip=True, overcomplete=2)
    with pytest.raises(UserError, match=r"embed_dim 24 is not a multiple of num_heads 5"):
        crate_mae.create_model(NANO, **(TINY | {"num_heads": 5}))
    with pytest.raises(UserError, match="cannot be split into 3 heads"):
        Compression(20, 3)


def test_autocast_neither_rounds_nor_outdates_the_retraction(generator):
    subspaces = anything(OrthogonalSubspaces(WIDTH), generator).train()
    x = torch.eye(WIDTH)[None]
    with torch.no_grad():
        subspaces.weight.mul_(1.1)
    with torch.autocast("cpu", torch.bfloat16):
        applied = subspaces(x)[0].float()
        for _ in range(30):
            subspaces.train()(x)
    assert distance_from_orthogonal(subspaces.weight.detach()) < 0.2
    assert (torch.linalg.svdvals(applied.detach()) < 1.02).all()


def test_precision_may_change_between_calls(generator):
    layer = anything(MonotoneEncoderLayer(WIDTH, HEADS), generator).eval()
    z = hostile_tokens(generator)
    single = layer(z.float())
    torch.testing.assert_close(layer.double()(z), single.double(), rtol=1e-3, atol=1e-3)
    assert MonotoneEncoderLayer(WIDTH, HEADS, dtype=torch.bfloat16).eval()(z.bfloat16()).isfinite().all()


def test_a_pass_leaves_earlier_graphs_and_frozen_weights_alone(generator):
    subspaces = anything(OrthogonalSubspaces(WIDTH), generator).train()
    x = torch.randn(2, 3, WIDTH, generator=generator)
    first = subspaces(x).sum()
    (first + subspaces.eval()(x).sum() + subspaces.train()(x).sum()).backward()
    frozen = anything(OrthogonalSubspaces(WIDTH), generator).train().requires_grad_(False)
    before = frozen.weight.clone()
    u = frozen(torch.eye(WIDTH)[None])[0]
    assert torch.equal(frozen.weight, before)
    assert distance_from_orthogonal(u) < 1e-5


@pytest.mark.parametrize("log_scale", [-300.0, 0.0, 5.0, 300.0])
def test_no_temperature_makes_numbers_that_are_not_finite(log_scale, generator):
    attn = Compression(4, 1)
    torch.nn.init.constant_(attn.log_scale, log_scale)
    x = torch.tensor([[[24.0, 0, 0, 0], [12.0, 0, 0, 0]]]) @ attn.subspaces.matrix().detach()
    out = attn(x.requires_grad_())
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(attn.eval().folded()(x), attn(x), rtol=1e-4, atol=1e-4)
