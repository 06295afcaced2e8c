"""What the report says follows the numbers, in either direction."""

import dataclasses

import pytest
import torch

import crate_mae
from crate_mae.drawing.text import html, listed, mathtext, number, percent, plural, raised, signed
from crate_mae.interpret.removals import AttentionUse, Removal
from crate_mae.interpret.report.findings import (
    STAND_IN_LIMITS,
    attention_finding,
    information_finding,
    inverses_finding,
    lengths_finding,
    rates_finding,
    removals_finding,
    sparsity_finding,
    steps_finding,
    verdict_sentence,
    write_findings,
)
from crate_mae.interpret.report.inspection import SubjectMeasures, inspect_model
from crate_mae.interpret.report.options import InspectOptions
from crate_mae.interpret.statistics import Row, trend

FORMS = {"subspace_rate": "z_half", "subspace_rate_normalised": "z_half", "subspace_rate_official": "projections"}


def curve(means, *, measure="x", point="", spread=1.0, n=100, over="images", part="encoder"):
    """Rows in which the change of every image from the first layer has the spread."""
    return [Row(part, i, measure, point, m, spread, n, over, m - means[0], spread) for i, m in enumerate(means)]


@pytest.fixture(scope="module")
def inspection():
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 2, "in_chans": 1}
    model = crate_mae.create_model("crate_mae_nano_patch2_8", **small)
    return inspect_model(InspectOptions(model, "digits:test", out="", count=3, probe_images=0))


def with_curve(inspection, key, measure, point, means, **options):
    """The inspection with another curve in place of a subject's own."""
    measured: list[SubjectMeasures] = []
    for found in inspection.measured:
        if found.key == key:
            kept = [r for r in found.measures.rows if (r.measure, r.point) != (measure, point)]
            rows = kept + curve(means, measure=measure, point=point, **options)
            found = dataclasses.replace(found, measures=dataclasses.replace(found.measures, rows=rows))
        measured.append(found)
    return dataclasses.replace(inspection, measured=measured)


def rates(inspection, **means):
    for key, values in means.items():
        for form, point in FORMS.items():
            inspection = with_curve(inspection, key, form, point, values)
    return rates_finding(inspection)


def test_numbers_are_written_shortly():
    assert [html(number(x)) for x in (0.0, 0.4, -12.345, 541.26, 12345.6, 1e-7, 3e8, 0.0123)] == [
        *("0", "0.400", "−12.3", "541", "12,346", "1.0·10<sup>−7</sup>", "3.0·10<sup>8</sup>", "0.0123"),
    ]
    assert (percent(0.995), plural(1, "layer"), plural(2000, "image")) == ("100%", "1 layer", "2,000 images")
    assert (listed(["a"]), listed(["a", "b", "c"])) == ("a", "a, b and c")
    assert html("lowers R^c < 1") == "lowers R<sup>c</sup> &lt; 1"
    assert html("R - U_k^⊤z of λ‖Z‖_0\na_b") == "R − U<sub>k</sub><sup>⊤</sup>z of λ‖Z‖<sub>0</sub><br>a_b"
    assert html("Σ_k p^−1/2 q_σ") == "Σ<sub>k</sub> p<sup>−1/2</sup> q<sub>σ</sub>"
    assert html(html("a < b")) == "a &lt; b"
    assert raised("R - R^c of 10^−7") == "R − Rᶜ of 10⁻⁷"
    assert mathtext("R - R^c vs. U_k, λ‖Z‖_0") == "R − R$^c$ vs. U$_k$, λ‖Z‖$_0$"


def test_a_change_is_written_with_its_sign():
    assert [signed(x) for x in (0.0505, -2.0, 0.0)] == ["+0.0505", "−2.00", "0"]


def test_the_verdict_counts_what_holds_against_the_controls(inspection):
    rows = inspection.model.measures.audit
    others = [found for found in inspection.measured if found is not inspection.model]

    def verdict_of(audit):
        measures = dataclasses.replace(inspection.model.measures, audit=audit)
        model = dataclasses.replace(inspection.model, measures=measures)
        return verdict_sentence(dataclasses.replace(inspection, measured=[model, *others]))

    held = [dataclasses.replace(row, status="holds", holds=True, learned=True) for row in rows[:2]]
    as_random = dataclasses.replace(rows[2], status="theorem", holds=True, learned=False)
    proven = dataclasses.replace(rows[3], status="theorem", holds=False)
    start = f"Of {len(rows)} claims about what this model’s layers do, "
    assert verdict_of(rows).startswith(f"{start}0 hold. The controls are")
    assert verdict_of([*held, *rows[2:]]).startswith(f"{start}2 hold: 2 by a clear margin over the best control. ")
    assert verdict_of([*held, as_random, proven, *rows[4:]]).startswith(
        f"{start}4 hold: 3 by a clear margin over the best control, 1 of them no better than with random "
        "initialisation; 1 only as theorems of the layer. "
    )
    assert "does not apply" in verdict_of([])


def test_a_verdict_needs_a_paired_change_whose_interval_is_not_around_0():
    assert str(trend(curve([5.0, 6.0, 3.0]))) == "5.00 → 3.00, falls (1 of 2 steps)"
    assert str(trend(curve([3.0, 5.0]))) == "3.00 → 5.00, rises (1 of 1 step)"
    assert trend(curve([5.0, 3.0], spread=20.0)).verdict == "unclear"
    alike = [dataclasses.replace(row, change_spread=0.1) for row in curve([5.0, 3.0], spread=20.0)]
    assert trend(alike).verdict == "falls"  # images differ by much more than any of them changes
    assert trend(curve([5.0, 3.0], spread=None, n=1)).verdict == "unclear"
    assert trend(curve([5.0, 3.0], spread=None, n=1, over="layer")).verdict == "falls"
    assert trend(curve([5.0])).verdict == "unclear"
    assert trend([]) is None


def test_a_fall_of_the_rate_is_said_and_weighed_against_random_weights(inspection):
    learned = rates(inspection, model=[9.0, 7.0, 5.0], random=[5.0, 5.0])
    assert "falls in all 3 forms" in learned.answer
    assert "the fall was learned" in learned.more[0]
    chance = rates(inspection, model=[9.0, 5.0], random=[9.0, 4.0])
    assert "is no evidence of learning" in chance.more[0]
    broken = rates(inspection, model=[5.0, 9.0], random=[9.0, 4.0])
    assert "rises in all 3 forms" in broken.answer
    assert "does not hold" in broken.more[0]
    assert "shows no clear change in all 3 forms" in rates(inspection, model=[5.0, 5.01], random=[5.0, 5.01]).answer


@pytest.mark.parametrize(("means", "words"), [([5.0, 9.0], "5.00 → 9.00, rises"), ([9.0, 5.0], "9.00 → 5.00, falls")])
def test_a_black_box_is_told_by_its_stand_in_and_its_limits_are_said(inspection, means, words):
    random = inspection.measured[1]
    rows = curve(means, measure="value_rate_official", point="projections")
    black_box = dataclasses.replace(random, key="baseline", measures=dataclasses.replace(random.measures, rows=rows))
    found = rates_finding(dataclasses.replace(inspection, measured=[*inspection.measured, black_box]))
    assert f"Baseline, a black box, with value projections instead of subspaces: {words} (1 of 1 step)." in found.more
    assert found.more[-1] == STAND_IN_LIMITS
    assert "baseline\n(stand-in)" in [row[0] for row in found.table.rows]
    alone = rates_finding(dataclasses.replace(inspection, measured=[dataclasses.replace(black_box, key="model")]))
    assert "has no subspaces" in alone.answer and words in alone.answer
    assert STAND_IN_LIMITS not in rates_finding(inspection).more


def test_a_black_box_is_weighed_against_its_own_random_weights(inspection):
    def told(trained, fresh):
        means = {"baseline": trained, "random_baseline": fresh}
        rows = {key: curve(values, measure="value_rate_official", point="projections") for key, values in means.items()}
        random = inspection.measured[1]
        boxes = [
            dataclasses.replace(random, key=key, measures=dataclasses.replace(random.measures, rows=found))
            for key, found in rows.items()
        ]
        found = rates_finding(dataclasses.replace(inspection, measured=[*inspection.measured, *boxes]))
        return " ".join(found.more)

    assert "that stand-in falls as well: its direction alone is no evidence" in told([9.0, 5.0], [9.0, 4.0])
    assert "that stand-in shows no clear change: the difference was learned" in told([9.0, 5.0], [9.0, 9.01])


def test_forms_that_disagree_are_told_apart(inspection):
    first, *others = FORMS.items()
    mixed = with_curve(inspection, "model", *first, [5.0, 9.0])
    for form in others:
        mixed = with_curve(mixed, "model", *form, [9.0, 5.0])
    answer = rates_finding(mixed).answer
    assert "R^c of normalised tokens and R^c as in the official code fall and R^c of tokens as they are rises" in answer


def test_tokens_that_become_alike_are_blamed(inspection):
    alike = with_curve(inspection, "model", "token_diversity", "z_next", [0.9, 0.1], spread=0.01)
    assert any("more similar, which lowers every rate" in text for text in rates_finding(alike).more)
    unlike = with_curve(inspection, "model", "token_diversity", "z_next", [0.1, 0.9], spread=0.01)
    assert any("do not become more similar" in text for text in rates_finding(unlike).more)


@pytest.mark.parametrize(
    ("means", "words"),
    [([0.1, 0.9], "sparser by exact zeros"), ([0.9, 0.1], "denser by exact zeros")],
)
def test_sparsity_goes_either_way(inspection, means, words):
    found = sparsity_finding(with_curve(inspection, "model", "zero_fraction", "z_next", means, spread=0.01))
    assert words in found.answer


def with_audit(inspection, status, share=1.0):
    rows = [dataclasses.replace(row, status=status, holds=status == "holds") for row in inspection.model.measures.audit]
    model = dataclasses.replace(inspection.model, measures=dataclasses.replace(inspection.model.measures, audit=rows))
    return dataclasses.replace(inspection, measured=[model, *inspection.measured[1:]])


def test_claims_are_counted(inspection):
    held = steps_finding(with_audit(inspection, "holds"))
    assert (
        "Of 28 claims about single steps of single layers, 28 hold: 28 by a clear margin over the best control"
        in held.answer
    )
    assert "ISTA makes more exact zeros than relu(x) (in every layer)" in held.more[0]
    failed = steps_finding(with_audit(inspection, "does not hold"))
    assert failed.answer == "Of 28 claims about single steps of single layers, 0 hold."
    assert failed.more == ("On all tokens: no claim holds in any layer.",)


def test_a_contradicted_theorem_is_said_first(inspection):
    assert "Theorems of this model’s layers" in steps_finding(with_audit(inspection, "theorem")).more[-1]
    found = steps_finding(with_audit(inspection, "contradiction"))
    assert found.warning.startswith("Contradiction: an image contradicts a theorem") and "(E1)" in found.warning


def test_sparsity_is_istas_only_where_it_makes_more_zeros_than_relu(inspection):
    assert "than ReLU in 0 of 2 layers" in sparsity_finding(with_audit(inspection, "does not hold")).answer
    assert "than ReLU in 2 of 2 layers" in sparsity_finding(with_audit(inspection, "holds")).answer


def test_shrinking_and_mixing_are_told(inspection):
    found = lengths_finding(with_audit(inspection, "does not hold"))
    assert "sorts tokens in 0 of 2 layers" in found.answer
    use = [AttentionUse("", None, 0.5, 0.0, 0.0, 0.0, 9, 0.4, 0.3, 0.5)]
    use += [AttentionUse("encoder", None, 0.75, 0.25, 0.2, 0.3, 9, 0.3, 0.2, 0.4)]
    answer = attention_finding(dataclasses.replace(inspection, attention_use=use)).answer
    assert (
        "changes by +0.250, from 0.500 to 0.750, and the accuracy of a linear probe of the last layer from 40% to 30%"
        in answer
    )


def test_an_inverse_must_beat_doing_nothing(inspection):
    good = with_curve(inspection, "model", "inverse_cosine", "", [0.9, 0.9])
    good = with_curve(good, "model", "inverse_cosine_identity", "", [0.5, 0.95])
    assert "in 1 of 2 layers (mean cosine 0.900, compared with 0.725" in inverses_finding(good).answer


def test_what_is_kept_is_told(inspection):
    found = information_finding(with_curve(inspection, "model", "pixel_r2", "z_next", [0.98, 0.35]))
    assert "98% of the pixels’ variance after the first encoder layer, and 35% after the last" in found.answer


def test_every_subject_has_one_answer(inspection):
    found = write_findings(inspection)
    assert len({finding.anchor for finding in found}) == len(found) == 7
    assert all(finding.answer.endswith(".") for finding in found)


def test_what_matters_is_counted_after_correction_and_the_costliest_parts_come_first():
    def removal(kind, index, beyond, p, accuracy=None):
        worst = (None, None, None) if accuracy is None else (accuracy / 2, "cat", 2 * accuracy)
        loss = (beyond + 0.1, 0.1, beyond, beyond - 0.01, beyond + 0.01)
        return Removal("encoder", 1, kind, index, 0.25, *loss, p, accuracy, *worst)

    found = removals_finding(
        [
            removal("head", 0, 0.02, 1e-6, -0.04),
            removal("head", 1, 0.001, 0.03, 0.01),  # not after correction for four
            removal("head", 2, -0.05, 1.0, 0.0),
            removal("atom", 7, 0.3, 1e-9),
        ]
    )
    assert found.answer == (
        "Removed one at a time, 1 of 3 heads cost more than random subspaces do and "
        "1 of 1 atom cost more than random sets of atoms do."
    )
    said = (
        "when head 0 of E1 is removed: −4.0 points (controls: −2.0 points); most of all on images of cat: −8.0 points"
    )
    assert said in found.more[-1]
    assert [row[0] for row in found.table.rows] == ["atom 7 of E1", "head 0 of E1", "head 1 of E1", "head 2 of E1"]
    assert found.table.rows[0][4:6] == ["+0.300", "+0.290 to +0.310"] and found.table.rows[0][6] == "–"
