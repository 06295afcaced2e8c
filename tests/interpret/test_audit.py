"""The audit can fail: steps are held against controls, by hand-computed margins, and the rule is applied as written."""

import dataclasses
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp

import crate_mae
from crate_mae.data import open_source
from crate_mae.data.facts import fixed_sample
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.interpret import audit as claims
from crate_mae.interpret.audit import (
    CLAIMS,
    CONTROLS,
    Measured,
    MeasuredStep,
    audit,
    contradicts,
    holm,
    jackknife,
    margins_over,
    p_value,
)
from crate_mae.interpret.measure import measure_layers, open_measurable
from crate_mae.interpret.statistics import statistic
from crate_mae.interpret.steps import mean_sum, measure_claims, measure_layer, pool, token_sum
from crate_mae.models.features import evaluating
from crate_mae.theory import coding_rate, lasso_objective, subspace_coding_rate

PUBLISHED = Path(__file__).parents[2] / "trained_models/crate_mae_micro_cifar10"
E0 = MeasuredStep("all", "encoder", 0)


def measured(key, after, **controls):
    """A claim whose value before is 100 in every image."""
    after = torch.tensor(after)
    before = torch.full_like(after, 100.0)
    margins = margins_over(CLAIMS[key].sign, after, {name: torch.tensor(c) for name, c in controls.items()})
    return Measured(before, after, margins, before)


def judged(found, key=claims.COMPRESS, theorems=frozenset(), draws=()):
    layers = {E0: {key: found._replace(is_theorem=key in theorems)}}
    (row,) = audit(layers, [{E0: {key: draw}} for draw in draws])
    return row


def walk(net, images, **options):
    with evaluating(net):
        return measure_claims(net, {"all": list(images.split(4))}, **options)


def test_margins_are_over_the_best_control_image_by_image():
    found = measured(claims.COMPRESS, [90.0, 80.0, 99.0], a=[95.0, 100.0, 98.0], b=[100.0, 85.0, 99.5])
    row = judged(found)
    # Per image: min(5, 10), min(20, 5), min(-1, 0.5).
    assert row.margin == pytest.approx((5 + 5 - 1) / 3)
    assert row.margin_share == pytest.approx(0.03)
    assert row.share_of_images == pytest.approx(2 / 3)
    assert row.closest_control == "b"  # means: 8 over a, 5.17 over b
    assert row.p_holm == pytest.approx(ttest_1samp([5, 5, -1], 0, alternative="greater").pvalue)
    assert (row.before, row.after, row.n) == (100, pytest.approx(89.6667), 3)
    assert row.status == "does not hold"


def test_a_claim_that_value_rises_is_judged_the_other_way():
    found = measured(claims.EXPAND, [110.0, 112.0, 114.0], a=[100.0, 100.0, 100.0])
    row = judged(found, claims.EXPAND)
    assert (row.margin, row.status) == (pytest.approx(12), "holds")


@pytest.mark.parametrize(
    ("share_of_images", "mean_share", "holds"), [(1.0, 0.02, True), (0.9, 0.02, False), (1.0, 0.009, False)]
)
def test_a_claim_needs_nearly_all_images_and_an_effect(share_of_images, mean_share, holds):
    margins = torch.full((100,), 100 * mean_share) + 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    margins[: round(100 * (1 - share_of_images))] = -0.1
    found = Measured(torch.full((100,), 100.0), 100 - margins, {"a": margins}, torch.full((100,), 100.0))
    assert judged(found).holds is holds


def test_holms_correction_is_that_computed_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.8, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_claims_and_layers_are_corrected_together_and_kinds_of_tokens_apart():
    one = measured(claims.COMPRESS, [97.0, 90.0, 99.0], a=[100.0, 100.0, 100.0])
    layer = {claims.COMPRESS: one, claims.COMPRESS_UNIT: one}
    places = [MeasuredStep(tokens, "encoder", number) for tokens in ("all", "visible") for number in (0, 1, 2)]
    (alone,) = audit({E0: {claims.COMPRESS: one}})
    rows = audit(dict.fromkeys(places, layer))
    assert len(rows) == 12
    assert [row.p_holm for row in rows] == pytest.approx([min(1.0, 6 * alone.p_holm)] * 12)
    assert 0 < 6 * alone.p_holm < 1


def test_what_untrained_networks_do_as_well_was_not_learned():
    found = measured(claims.COMPRESS, [90.0, 91.0, 90.5], **{claims.NO_CHANGE: [100.0, 100.0, 100.0]})
    weaker, stronger = (measured(claims.COMPRESS, [x, x], a=[100.0, 100.0]) for x in (95.0, 80.0))
    row = judged(found, draws=[weaker, weaker])
    assert (row.learned, row.untrained, row.status) == (True, pytest.approx(0.05), "holds")
    row = judged(found, draws=[weaker, stronger])
    assert (row.learned, row.untrained, row.status) == (False, pytest.approx(0.2), "does not hold")
    # Theorems, and the lasso of a network's own dictionary, do not have to be learned.
    assert judged(found, theorems=frozenset({claims.COMPRESS}), draws=[stronger]).holds
    assert judged(found, claims.LASSO, draws=[stronger]).status == "holds"


def test_a_theorem_stands_unless_an_image_contradicts_it():
    theorems = frozenset({claims.COMPRESS})
    kept = Measured(
        *(torch.tensor([100.0, 100.0]), torch.tensor([99.9, 99.0])),
        {claims.NO_CHANGE: torch.tensor([0.1, 1.0]), claims.NO_MIXING: torch.tensor([-5.0, -5.0])},
        torch.tensor([100.0, 100.0]),
    )
    row = judged(kept, theorems=theorems)
    assert (row.status, row.holds) == ("theorem", False)  # true of all weights, and no better than without mixing
    broken = kept._replace(margins={claims.NO_CHANGE: torch.tensor([0.1, -0.1])})
    assert contradicts(claims.COMPRESS, broken)
    assert judged(broken, theorems=theorems).status == "contradiction"
    rounded = kept._replace(margins={claims.NO_CHANGE: torch.tensor([0.1, -1e-4])})
    assert not contradicts(claims.COMPRESS, rounded)


def test_one_image_proves_nothing():
    row = judged(measured(claims.COMPRESS, [50.0], a=[100.0]))
    assert (row.holds, row.p_holm, row.margin_low, row.margin_high) == (False, 1.0, None, None)


def test_p_values_of_equal_margins():
    assert p_value(statistic(torch.full((5,), 2.0))) == 0
    assert p_value(statistic(torch.zeros(5))) == 1


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0], dtype=torch.float64)
    without = (x.sum() - x) / 4
    found = jackknife(torch.cat([x.mean()[None], without]))
    assert (found.mean, found.n) == (pytest.approx(float(x.mean())), 5)
    assert found.spread == pytest.approx(float(x.std()))
    assert jackknife(torch.tensor([3.0])).spread is None


def test_every_control_of_the_table_is_explained():
    assert {control for claim in CLAIMS.values() for control in claim.controls} == set(CONTROLS)


def test_values_are_those_of_the_layer(build, images):
    model = build()
    rows = {(row.part, row.layer, row.claim): row for row in audit(walk(model, images))}
    layer = model.encoder.blocks[0]
    with torch.no_grad(), crate_mae.trace(model, ["*.z", "*.z_half", "*.z_next", "*.code"]) as record:
        model(images, mask=torch.zeros(len(images), model.num_patches, dtype=torch.bool))
    points = {name: values[0] for name, values in record.items()}
    z, z_half, code = (points[f"encoder.blocks.0.{kind}"] for kind in ("z", "z_half", "code"))
    with torch.no_grad():
        u, x = layer.attn.bases(), layer.norm2(z_half)
        step = z_half - z
        w = layer.attn.project(layer.norm1(z))
        alone = layer.attn.step(w, w)
        rates = [subspace_coding_rate(t, u) for t in (z, z_half, z - step, z + alone)]
        lasso = [
            float(lasso_objective(a, x, layer.ista.dictionary, 0.5)) for a in (code, x.relu(), torch.zeros_like(x))
        ]
        y, y_next = (points[f"decoder.blocks.0.{kind}"] for kind in ("z_half", "z_next"))
        undo = [subspace_coding_rate(t, model.decoder.blocks[0].attn.bases()) for t in (y, y_next)]
    row = rows["encoder", 0, claims.COMPRESS]
    assert (row.before, row.after) == pytest.approx([float(r.mean()) for r in rates[:2]], rel=1e-4)
    best = torch.stack([rates[0] - rates[1], rates[2] - rates[1], rates[3] - rates[1]]).amin(0)
    assert row.margin <= float(best.mean()) + 1e-3
    row = rows["encoder", 0, claims.LASSO]
    assert (row.after, row.before) == pytest.approx((lasso[0], lasso[2]), rel=1e-4)
    assert rows["encoder", 0, claims.LASSO_ZERO].margin == pytest.approx(lasso[2] - lasso[0], rel=1e-3)
    row = rows["encoder", 0, claims.SPARSITY]
    assert row.after - row.before == pytest.approx(float(((code == 0).float() - (x <= 0).float()).mean()), abs=1e-5)
    row = rows["decoder", 0, claims.DECOMPRESS]
    assert (row.before, row.after) == pytest.approx([float(r.mean()) for r in undo], rel=1e-4)
    assert {row.n for row in rows.values()} == {7}


def descending(layer, sign=1.0):
    """Make a layer's step one down R^c: tied to orthogonal subspaces, with -W_k that the published step lacks."""
    attn = layer.attn
    with torch.no_grad():
        attn.subspaces.weight.copy_(torch.eye(24))
        attn.proj.weight.copy_(torch.eye(24))
        attn.proj.bias.zero_()
    step = type(attn).step
    attn.step = lambda w, mixed: sign * 0.3 * step(attn, w, mixed - w)
    attn.register_forward_hook(lambda m, inputs, _: m.step(w := m.project(inputs[0]), m.membership(w) @ w))


def test_a_descending_step_compresses_and_its_negative_does_not(build, images):
    for sign, status in ((1.0, "holds"), (-1.0, "does not hold")):
        model = build(depth=1, decoder_depth=1)
        descending(model.encoder.blocks[0], sign)
        (row,) = [row for row in audit(walk(model, images)) if row.claim == claims.COMPRESS]
        assert row.status == status
        if sign < 0:
            assert row.closest_control in (claims.FLIPPED, claims.NO_CHANGE, claims.NO_MIXING)
            assert row.share_of_images == 0


def test_a_network_without_attention_compresses_nothing(build, images):
    """The review found that one passes a test of the sign alone: here its step is one of its own controls."""
    model = build()
    for layer in model.encoder.blocks:
        layer.attn.membership = lambda w: torch.eye(w.shape[-2]).expand(*w.shape[:-1], w.shape[-2])
        layer.attn.register_forward_hook(lambda m, inputs, _: m.step(w := m.project(inputs[0]), w))
    forms = (claims.COMPRESS, claims.COMPRESS_NORMALISED, claims.COMPRESS_UNIT)
    rows = [row for row in audit(walk(model, images)) if row.claim in forms]
    assert len(rows) == 6
    assert {row.status for row in rows} == {"does not hold"}
    assert all(row.margin <= 1e-4 for row in rows)


def test_relu_in_the_place_of_ista_is_neither_sparse_nor_sparse_coding(build, images):
    model = build()
    for layer in model.encoder.blocks:
        layer.ista.register_forward_hook(lambda _m, inputs, _code: inputs[0].relu())
    keys = (claims.SPARSITY, claims.LASSO, claims.EXPAND, claims.EXPAND_REDUCTION)
    rows = [row for row in audit(walk(model, images)) if row.claim in keys]
    assert {row.status for row in rows} == {"does not hold"}
    assert all(row.margin <= 1e-6 for row in rows)
    assert {row.closest_control for row in rows if row.claim == claims.SPARSITY} == {claims.RELU}


def test_plain_shrinking_and_averaging_sort_nothing(build, images):
    """Each has a margin of 0 over itself at an equal fall of R^c."""
    for shrink in (True, False):
        model = build(depth=1, decoder_depth=1)
        layer = model.encoder.blocks[0]

        def move(_m, inputs, _output, shrink=shrink):
            z = inputs[0] if shrink else inputs[0] - inputs[0].mean(1, keepdim=True)
            return -0.2 * z

        layer.norm1 = torch.nn.LayerNorm(24, elementwise_affine=False)
        layer.norm1.register_forward_hook(lambda _m, inputs, _x: inputs[0])
        layer.attn.register_forward_hook(move)
        with torch.no_grad(), crate_mae.trace(model.encoder, ["blocks.0.z"]) as record:
            model.encoder.forward_features(images)
        found, _ = measure_layer(layer, record["blocks.0.z"][0])
        own = claims.SHRINKING if shrink else claims.UNIFORM
        assert float(found[claims.SORT].margins[own][0]) == pytest.approx(0, abs=1e-3)
        assert float(found[claims.SORT].margins[claims.NO_CHANGE][0]) > 0


def test_an_overcomplete_code_is_compared_with_no_code_alone(build, images):
    rows = audit(walk(build(overcomplete=4), images))
    keys = {row.claim for row in rows}
    assert claims.LASSO_ZERO in keys
    assert not keys & {claims.LASSO, claims.SPARSITY, claims.EXPAND}


def test_a_vit_has_nothing_to_audit(build, images):
    assert audit(walk(build("vit_mae_nano_patch2_8"), images)) == []


def test_layers_declare_their_theorems(build, images):
    model = build()
    model.encoder.blocks[1].theorems = frozenset({claims.LASSO_ZERO, claims.SPARSITY})
    status = {(row.layer, row.claim): row.status for row in audit(walk(model, images)) if row.part == "encoder"}
    for key in (claims.LASSO_ZERO, claims.SPARSITY):
        assert status[1, key] in ("theorem", "contradiction")
        assert status[0, key] in ("holds", "does not hold")


def test_a_step_from_normalised_tokens_is_measured_from_there(build, images):
    model = build()
    layer = model.encoder.blocks[0]
    with torch.no_grad():
        layer.norm1.weight.mul_(1.7)  # applied once, and not twice
        layer.starts_from_norm = True
        z = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(0))
        found, _ = measure_layer(layer, z)
        x = layer.norm1(z)
        assert found[claims.COMPRESS].before.tolist() == pytest.approx(
            subspace_coding_rate(x, layer.attn.bases()).tolist(), rel=1e-5
        )
        scaled = 24**0.5 * torch.nn.functional.normalize(x, dim=-1)
        assert found[claims.COMPRESS_NORMALISED].before.tolist() == pytest.approx(
            subspace_coding_rate(scaled, layer.attn.bases()).tolist(), rel=1e-5
        )


def test_pooled_rates_are_those_of_all_tokens_with_and_without_each_group():
    z = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.eye(8, dtype=torch.float64).unflatten(1, (2, 4)).transpose(0, 1)
    groups = z.tensor_split(3)
    found = pool([token_sum(g) for g in groups], torch.full((3,), 10.0, dtype=torch.float64), q)
    rest = [z, z[2:], torch.cat([z[:2], z[4:]]), z[:4]]
    assert found.rate().tolist() == pytest.approx([float(coding_rate(t.flatten(0, 1))) for t in rest])
    assert found.subspace_rate().tolist() == pytest.approx(
        [float(subspace_coding_rate(t.flatten(0, 1), q)) for t in rest]
    )
    means = z.mean(1, keepdim=True).expand_as(z)
    torch.testing.assert_close(mean_sum(z), token_sum(means))


def test_encoders_of_visible_patches_are_audited_on_those_too(build):
    found = measure_layers(build(mask_tokens="decoder"), "digits:test", count=5, untrained=2)
    assert {row.tokens for row in found.audit} == {"all", "visible"}
    rows = {(row.tokens, row.part, row.layer, row.claim): row for row in found.audit}
    for (tokens, part, layer, key), row in rows.items():
        if tokens == "all" and part == "encoder":
            assert rows["visible", part, layer, key].after != row.after
    assert {row.tokens for row in measure_layers(build(), "digits:test", count=5, untrained=0).audit} == {"all"}


def test_the_same_numbers_come_again_and_untrained_draws_are_reported(build):
    found = [measure_layers(build(), "digits:test", count=6, untrained=2).audit for _ in range(2)]
    assert found[0] == found[1]
    assert all(row.untrained is not None and row.learned is not None for row in found[0])
    assert all(row.learned is None for row in measure_layers(build(), "digits:test", count=3, untrained=0).audit)


def test_quick_measures_are_the_first_of_all(build, images):
    whole, quick = (walk(build(), images, quick=quick) for quick in (False, True))
    for place, layer in whole.items():
        for key, found in layer.items():
            part = quick[place][key]
            assert len(part.after) == 1
            assert part.after[0] == pytest.approx(float(found.after[0]), rel=1e-6)


def test_the_trained_model_with_published_layers_does_not_hold(shared):
    """What the review measured: no compression, lasso above the all-zero code, no more zeros than ReLU, no sorting."""
    model, source = open_measurable(str(PUBLISHED), 0), open_source(shared / "data/cifar10/test.parquet")
    images = read_images(source, model.backbone.transform(), fixed_sample(len(source), 12, 0), 12).images
    rows = [row for row in audit(walk(model.net, images)) if row.part == "encoder"]
    assert {row.status for row in rows} == {"does not hold"}
    by = {(row.layer, row.claim): row for row in rows}
    assert by[0, claims.COMPRESS].after > by[0, claims.COMPRESS].before + 20
    assert by[1, claims.COMPRESS_UNIT].after < by[1, claims.COMPRESS_UNIT].before - 50  # and controls do it, too
    assert by[1, claims.COMPRESS_UNIT].margin < 0
    assert all(by[layer, claims.LASSO].after > 1.3 * by[layer, claims.LASSO].before for layer in range(3))
    assert all(by[layer, claims.LASSO].closest_control == claims.ZERO for layer in range(3))
    assert dataclasses.asdict(rows[0])["closest_control"]


MONOTONE = "crate_mae_nano_monotone_patch2_8"


@pytest.mark.parametrize(("layer", "seed"), [("monotone", 0), ("monotone", 1), ("compressing", 0)])
def test_no_image_contradicts_a_theorem_of_the_layers(layer, seed):
    torch.manual_seed(seed)
    net = crate_mae.create_model(MONOTONE, layer=layer, embed_dim=24, num_heads=3, depth=2, decoder_depth=2)
    with torch.no_grad():  # any weights at all
        for name, parameter in net.named_parameters():
            if "subspaces" not in name and "pred" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    rows = audit(walk(net, torch.randn(12, 3, 8, 8)))
    theorems = [row for row in rows if row.status == "theorem"]
    assert [(row.part, row.claim) for row in theorems] == [
        *[("encoder", claims.COMPRESS)] * 2,
        *[("encoder", claims.LASSO_ZERO)] * (2 if layer == "monotone" else 0),
        *[("decoder", claims.DECOMPRESS)] * 2,
    ]
    assert all(row.share_of_images is not None for row in theorems)
    assert not [row for row in rows if row.status == "contradiction"]


def test_a_monotone_step_of_the_wrong_sign_is_a_contradiction(monkeypatch):
    torch.manual_seed(0)
    net = crate_mae.create_model(MONOTONE, embed_dim=24, num_heads=3, depth=2, decoder_depth=2)
    kind = type(net.encoder.blocks[0].attn)
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda *arguments: -step(*arguments))
    rows = audit(walk(net, torch.randn(12, 3, 8, 8)))
    wrong = {row.claim for row in rows if row.status == "contradiction"}
    assert wrong == {claims.COMPRESS, claims.DECOMPRESS}
