"""The audit holds claims to images before and after a step, and is not easily pleased."""

import pytest
import torch

from crate_mae.interpret.audit import CLAIMS, audit, audit_measures
from crate_mae.interpret.statistics import Row
from crate_mae.interpret.streaming import stream
from crate_mae.models.tracing import trace
from crate_mae.theory import lasso_objective, subspace_coding_rate


def changed(measure, mean, spread, share, n=50, part="encoder"):
    return [
        Row(part, 0, measure, "change", mean, spread, n, "images"),
        Row(part, 0, measure, "share", share, 0.1, n, "images"),
    ]


@pytest.mark.parametrize(
    ("measure", "part", "mean", "holds"),
    [
        ("mssa_subspace_rate", "encoder", -1.0, True),
        ("mssa_subspace_rate", "encoder", -0.2, False),  # its interval, 0.284 to either side, has 0 in it
        ("mssa_subspace_rate", "encoder", 1.0, False),
        ("ista_gini", "encoder", 1.0, True),
        ("ista_gini", "encoder", -1.0, False),
        ("undo_subspace_rate", "decoder", 1.0, True),
        ("undo_subspace_rate", "decoder", -1.0, False),
    ],
)
def test_a_claim_holds_if_its_whole_interval_has_the_promised_sign(measure, part, mean, holds):
    (row,) = audit(changed(measure, mean, 1.0, 0.8, part=part))
    assert row.holds is holds
    assert row.claim == CLAIMS[measure].text
    assert (row.low, row.high) == pytest.approx((mean - 0.2842, mean + 0.2842), abs=1e-3)
    assert row.share == pytest.approx(0.8)
    assert 0.66 < row.share_low < 0.68 and 0.88 < row.share_high < 0.90  # Wilson, 40 of 50


def test_one_image_proves_nothing():
    (row,) = audit(changed("ista_gini", 1.0, None, 1.0, n=1))
    assert row.holds is False
    assert row.low is row.high is None


def test_changes_are_those_of_the_traces(build, images):
    model = build()
    rows = audit(stream(model, images.split(3), audit_measures()).rows)
    assert len(rows) == 2 * 8 + 2 * 3
    with torch.no_grad(), trace(model, ["*.z", "*.z_half", "*.z_next", "*.code"]) as record:
        model(images, mask_ratio=0.0)
    points = {name: values[0] for name, values in record.items()}
    layer = model.encoder.blocks[1]
    with torch.no_grad():
        u = layer.attn.bases()
        rate = [subspace_coding_rate(points[f"encoder.blocks.1.{point}"], u) for point in ("z", "z_half")]
        x = layer.norm2(points["encoder.blocks.1.z_half"])
        lasso = [
            lasso_objective(a, x, layer.ista.dictionary, 0.5) for a in (x, x.relu(), points["encoder.blocks.1.code"])
        ]
        u = model.decoder.blocks[0].attn.bases()
        undo = [subspace_coding_rate(points[f"decoder.blocks.0.{point}"], u) for point in ("z_half", "z_next")]
    expected = {
        ("encoder", 1, "mssa_subspace_rate"): rate[1] - rate[0],
        ("encoder", 1, "ista_lasso"): lasso[2] - lasso[0],
        ("encoder", 1, "ista_lasso_feasible"): lasso[2] - lasso[1],
        ("decoder", 0, "undo_subspace_rate"): undo[1] - undo[0],
    }
    found = {(row.part, row.layer, row.measure): row for row in rows}
    for key, change in expected.items():
        assert found[key].change == pytest.approx(float(change.mean()), rel=1e-3, abs=1e-3)
        assert found[key].n == 7
    share = ((rate[1] - rate[0]) < 0).float().mean()
    assert found["encoder", 1, "mssa_subspace_rate"].share == pytest.approx(float(share))


def test_a_layer_whose_attention_compresses_passes_and_its_negative_fails(build, images):
    """W_k = -U_k times a little is a step down the linear part of R^c; with the other sign it is a step up."""
    for sign, passes in ((-1.0, True), (1.0, False)):
        model = build(depth=1, decoder_depth=1)
        attn = model.encoder.blocks[0].attn
        with torch.no_grad():
            attn.proj.weight.copy_(sign * 0.05 * attn.subspaces.weight.t())
            attn.proj.bias.zero_()
        rows = audit(stream(model, [images], audit_measures()).rows)
        (row,) = [row for row in rows if row.measure == "mssa_subspace_rate"]
        assert row.holds is passes
        assert row.share == float(passes)


def test_an_overcomplete_code_is_compared_with_nothing(build, images):
    rows = audit(stream(build(overcomplete=4), [images], audit_measures()).rows)
    measures = {row.measure for row in rows}
    assert "ista_lasso" in measures and "ista_lasso_feasible" not in measures


def test_a_vit_has_nothing_to_audit(build, images):
    found = stream(build("vit_mae_nano_patch2_8"), [images], audit_measures())
    assert audit(found.rows) == []
    assert found.left_out == ["subspace rates", "audit of ISTA"]
