"""What the numbers mean, in plain words, whichever way they go.

Every statement follows from the numbers by a rule, and none is written by hand. Texts are in the notation of
`drawing.text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from crate_mae.drawing.measures import INVERSES, MEASURES
from crate_mae.drawing.templates import Table
from crate_mae.drawing.text import listed, number, percent, plural, signed
from crate_mae.interpret.audit import (
    CLAIMS,
    COMPRESS,
    COMPRESS_NORMALISED,
    COMPRESS_UNIT,
    LARGEST_P,
    SORT,
    SPARSITY,
    AuditRow,
    by_claim,
)
from crate_mae.interpret.removals import AttentionUse, Removal, mattering
from crate_mae.interpret.report.inspection import Inspection, SubjectMeasures
from crate_mae.interpret.report.subjects import NETWORKS
from crate_mae.interpret.statistics import Row, Trend, short_place, trend

VERDICT_RULE = (
    "A curve “falls” or “rises” if the 95% interval of its change from the first layer to the last does not contain 0, "
    "and shows “no clear change” if it does; changes are paired, image by image. “4 of 5 steps” "
    "means that the mean changes in this direction in 4 of 5 steps from one layer to the next."
)
STAND_IN_LIMITS = (
    "A stand-in takes the value projection W_v of each head for U_k: values are what attention mixes and passes on, as "
    "MSSA does with Z U_k. It shows whether the values of one image become more similar. It does not show that "
    "a network compresses: a black box is not derived to lower it and compares tokens with other projections (queries "
    "and keys), and its level is not comparable between networks of different widths."
)
_RATES = ("subspace_rate", "subspace_rate_normalised", "subspace_rate_official")
_SPARSITY = ("zero_fraction", "l1_to_l2", "gini")
_KEPT = ("pixel_r2", "feature_rank", "dead_coordinates", "probe_accuracy")
_MOST_REMOVALS = 15
_VERBS = {  # of one curve, of several
    "falls": ("falls", "fall"),
    "rises": ("rises", "rise"),
    "unclear": ("shows no clear change", "show no clear change"),
}
_TOKENS = {"all": "On all tokens", "visible": "On tokens as in training"}

Trends = Mapping[str, Mapping[str, Trend]]  # of each subject, by measure


@dataclass(frozen=True)
class Finding:
    """What the numbers say about one subject.

    Attributes:
        anchor: what links lead to.
        title: the subject.
        answer: one or two statements.
        warning: what must not be overlooked; "" if there is nothing.
        more: further sentences.
        table: the numbers behind it.
    """

    anchor: str
    title: str
    answer: str
    warning: str = ""
    more: tuple[str, ...] = ()
    table: Table | None = None


def write_findings(inspection: Inspection) -> list[Finding]:
    """A subject and a statement each, in the order of the derivation."""
    found = [
        rates_finding(inspection),
        sparsity_finding(inspection),
        steps_finding(inspection),
        lengths_finding(inspection),
        attention_finding(inspection),
        inverses_finding(inspection),
        information_finding(inspection),
    ]
    return [*found, removals_finding(inspection.removals)] if inspection.removals else found


def verdict_sentence(inspection: Inspection) -> str:
    """The audit of the model in a few words."""
    rows = inspection.model.measures.audit
    if not rows:
        return "The audit does not apply: this model has no attention in subspaces and no sparse coding."
    return (
        f"{_count_of_claims(rows, 'what this model’s layers do')} The controls are the same step reversed, without "
        "mixing, or in random subspaces; uniform attention; relu(x); and the all-zero code."
    )


def _count_of_claims(rows: Sequence[AuditRow], about: str) -> str:
    """How many claims hold, and how many of these no better than a random network or only as theorems."""
    held = [row for row in rows if row.is_met]
    better = [row for row in held if row.holds]
    unlearned = sum(row.learned is False for row in better)
    parts = []
    if better:
        part = f"{len(better)} by a clear margin over the best control"
        parts.append(f"{part}, {unlearned} of them no better than with random initialisation" if unlearned else part)
    if len(held) > len(better):
        parts.append(f"{len(held) - len(better)} only as theorems of the layer")
    return f"Of {plural(len(rows), 'claim')} about {about}, {len(held)} hold{': ' if parts else ''}{'; '.join(parts)}."


def rates_finding(inspection: Inspection) -> Finding:
    """How R^c changes through the encoder."""
    trends, stand_ins = _trends(inspection, _RATES), _stand_ins(inspection)
    own, more = trends.get("model"), []
    if own is not None:
        answer = f"From the first encoder layer to the last, {_tally(own)}."
        more += [*_against_random(own, trends.get("random"), inspection.model.is_random), *_collapse(inspection.model)]
        if reduction := trend(inspection.model.find("pooled_rate_reduction", "z_next")):
            more.append(f"R - R^c of the tokens of all images, which the layers are to raise: {reduction}.")
    else:
        answer = "This model’s attention is not MSSA: it has no subspaces, so R^c is not defined for it."
        if "model" in stand_ins:
            answer += f" With value projections instead of subspaces: {stand_ins['model']}."
    return Finding(
        "compression",
        "Subspace rate through the encoder",
        answer,
        more=(*more, *_black_boxes(inspection, stand_ins)),
        table=_rates_table(inspection, trends, stand_ins),
    )


def sparsity_finding(inspection: Inspection) -> Finding:
    """Whether tokens become sparser with depth, and whether ISTA makes them so."""
    trends = _trends(inspection, _SPARSITY)
    rows = [row for row in inspection.model.measures.audit if (row.claim, row.tokens) == (SPARSITY, "all")]
    more = []
    if rows:
        layers = [f"ISTA {percent(row.after)}, relu(x) {percent(row.before)} in layer {row.layer}" for row in rows]
        more.append(
            f"Exact zeros: {'; '.join(layers)}. Where ISTA makes no more than relu(x), ReLU would be as sparse."
        )
    more += [f"{_capitalised(found.label)}: {_sparser(trends[found.key])}." for found in inspection.measured[1:]]
    if inspection.model.find("zero_fraction", "z_next")[-1].mean == 0:
        more.append("There are no exact zeros in the last layer’s output.")
    held = sum(row.is_met for row in rows)
    than_relu = f"; ISTA makes more exact zeros than ReLU in {held} of {plural(len(rows), 'layer')}" if rows else ""
    return Finding(
        "sparsity",
        "Sparsity through the encoder",
        f"From the first encoder layer to the last, outputs become {_sparser(trends['model'])}{than_relu}.",
        more=tuple(more),
        table=_trend_table(inspection, trends, _SPARSITY, "Outputs of layers, first → last encoder layer"),
    )


def steps_finding(inspection: Inspection) -> Finding:
    """Which steps beat their controls."""
    anchor, title = "steps", "Each step against its controls"
    rows = inspection.model.measures.audit
    if not rows:
        answer = "The claims are about attention in subspaces and sparse coding, which this model does not have."
        return Finding(anchor, title, answer)
    broken = [f"{row.text} ({row.place})" for row in rows if row.status == "contradiction"]
    theorems = list(dict.fromkeys(row.text for row in rows if row.status == "theorem"))
    more = [_held_on(rows, tokens) for tokens in dict.fromkeys(row.tokens for row in rows)]
    if theorems:
        more.append(f"Theorems of this model’s layers: {'; '.join(theorems)}.")
    return Finding(
        anchor,
        title,
        _count_of_claims(rows, "single steps of single layers"),
        warning="Contradiction: an image contradicts a theorem, so a layer has a bug. " + "; ".join(broken) + "."
        if broken
        else "",
        more=tuple(more),
        table=_claims_table(inspection),
    )


def lengths_finding(inspection: Inspection) -> Finding:
    """Whether attention steps shrink tokens, or sort them."""
    anchor, title = "lengths", "Shrinking and sorting"
    ratios = inspection.model.find("length_ratio")
    if not ratios:
        return Finding(anchor=anchor, title=title, answer="This model has no attention in subspaces.")
    audit = {(row.claim, row.layer): row for row in inspection.model.measures.audit if row.tokens == "all"}
    claims, lines = (COMPRESS, COMPRESS_NORMALISED, COMPRESS_UNIT), []
    for row in ratios:
        rates = (audit.get((key, row.layer)) for key in claims)
        changes = ["–" if found is None else signed(found.after - found.before) for found in rates]
        sorting = audit.get((SORT, row.layer))
        margin = "–" if sorting is None else f"{signed(sorting.margin)} over {sorting.closest_control}"
        lines.append([short_place(row.part, row.layer), percent(row.mean), *changes, margin])
    measures = ("length_ratio", *(CLAIMS[key].measure for key in claims))
    sorts = sum(row.is_met for (key, _), row in audit.items() if key == SORT)
    return Finding(
        anchor,
        title,
        f"The attention step changes the length of tokens to {listed([percent(row.mean) for row in ratios])} of "
        f"what it was, layer by layer, and sorts tokens in {sorts} of {plural(len(ratios), 'layer')}.",
        more=(
            "A step that only shrinks tokens lowers R^c of tokens as they are, but not R^c of unit-length projections. "
            "A step sorts if, for the same decrease of R^c, R falls less than with plain shrinking of all tokens and "
            "with uniform attention.",
        ),
        table=Table(
            ["", *(MEASURES[name].label for name in measures), "sorting margin (nats)"],
            lines,
            "Change in the attention step, per image; the sorting margin is over all images",
        ),
    )


def attention_finding(inspection: Inspection) -> Finding:
    """Whether the network needs tokens to be mixed."""
    anchor, title = "mixing", "Use of attention"
    use, own = inspection.attention_use, inspection.model.find("self_attention")
    if not use or not own:
        answer = "Attention without mixing is measured only for autoencoders with attention in subspaces."
        return Finding(anchor, title, answer)
    intact, whole = use[0], next(found for found in use if found.part == "encoder" and found.layer is None)
    probe = ""
    if intact.accuracy is not None and whole.accuracy is not None:
        probe = f", and the accuracy of a linear probe of the last layer from {percent(intact.accuracy)} to "
        probe += percent(whole.accuracy)
    shares = listed([percent(row.mean) for row in own])
    uniform = inspection.model.find(MEASURES["self_attention"].control)
    return Finding(
        anchor,
        title,
        f"Without mixing in the encoder (P = I in all layers) the mean loss on hidden patches changes by "
        f"{signed(whole.change)}, from {number(intact.loss)} to {number(whole.loss)}{probe}.",
        more=(
            f"A token gives {shares} of its attention to itself, layer by layer; uniform attention gives "
            f"{percent(uniform[0].mean)}. If loss and probe do not change, a layer does not need mixing.",
        ),
        table=_use_table(use),
    )


def inverses_finding(inspection: Inspection) -> Finding:
    """How near decoder layers come to inverses of encoder layers."""
    anchor, title = "inverses", "Decoder layers as inverses of encoder layers"
    model = inspection.model
    own, idle = model.find("inverse_cosine"), model.find("inverse_cosine_identity")
    if not own:
        reason = model.measures.left_out.get("inverses", "it was not measured")
        return Finding(anchor, title, f"Not measured: {reason}.")
    more = []
    for measure in ("inverse_dictionary_cosine", "inverse_operator_cosine", "inverse_subspace_affinity"):
        rows, control = model.find(measure), model.find(MEASURES[measure].control)
        if rows and control:
            more.append(
                f"{_capitalised(MEASURES[measure].label)}: larger for the matching decoder layer than for the "
                f"others in {_more(rows, control)}."
            )
    networks = [found for found in inspection.measured if found.key in NETWORKS and found.find("inverse_cosine")]
    lines = [
        [
            MEASURES[measure].label,
            *(_mean(found.find(name)) for found in networks for name in (measure, MEASURES[measure].control)),
        ]
        for measure in INVERSES
    ]
    return Finding(
        anchor,
        title,
        "Applied to an encoder layer’s output, its decoder layer comes closer to the layer’s input than the unchanged "
        f"output does in {_more(own, idle)} (mean cosine {_mean(own)}, compared with {_mean(idle)}).",
        more=tuple(more),
        table=Table(
            ["", *(text for found in networks for text in (found.label, "its control"))],
            lines,
            "Means over layers. Controls: unchanged tokens, or, for weights, other decoder layers",
        ),
    )


def information_finding(inspection: Inspection) -> Finding:
    """What is kept on the way through the encoder."""
    anchor, title = "information", "Information kept through the encoder"
    pixels = trend(inspection.model.find("pixel_r2", "z_next"))
    if pixels is None:
        answer = "How much of the pixels tokens retain was not measured; see what is left out."
        return Finding(anchor, title, answer)
    more = []
    if probe := inspection.model.find("probe_accuracy"):
        best = max(probe, key=lambda row: row.mean)
        more.append(
            f"A linear probe is best on layer {best.layer}: {percent(best.mean)} right, and "
            f"{percent(probe[-1].mean)} on the last layer."
        )
    if dead := inspection.model.find("dead_coordinates"):
        worst = max(dead, key=lambda row: row.mean)
        most = f"Layer {worst.layer} has most dead coordinates: {percent(worst.mean)}."
        more.append(most if worst.mean > 0 else "No coordinate is dead in any layer.")
    columns = {name: [found.find(name, MEASURES[name].point) for found in inspection.measured] for name in _KEPT}
    columns = {name: rows for name, rows in columns.items() if any(rows)}
    lines = [
        [found.label, *(_ends(name, rows[number]) for name, rows in columns.items())]
        for number, found in enumerate(inspection.measured)
    ]
    return Finding(
        anchor,
        title,
        f"A linear map from a token to its own patch explains {percent(pixels.first)} of the pixels’ variance "
        f"after the first encoder layer, and {percent(pixels.last)} after the last.",
        more=tuple(more),
        table=Table(["", *(MEASURES[name].title for name in columns)], lines, "First → last encoder layer"),
    )


def _trends(inspection: Inspection, measures: Sequence[str]) -> dict[str, dict[str, Trend]]:
    """The trends of each subject that has them all."""
    found = {}
    for subject in inspection.measured:
        trends = {name: trend(subject.find(name, MEASURES[name].point)) for name in measures}
        whole = {name: value for name, value in trends.items() if value is not None}
        if len(whole) == len(measures):
            found[subject.key] = whole
    return found


def _stand_ins(inspection: Inspection) -> dict[str, Trend]:
    """The trend of each subject with value projections instead of subspaces."""
    name = "value_rate_official"
    return {key: trends[name] for key, trends in _trends(inspection, (name,)).items()}


def _tally(trends: Mapping[str, Trend]) -> str:
    """Such as "R^c of normalised tokens falls and R^c of tokens as they are rises"."""
    groups = {verdict: [MEASURES[m].title for m, t in trends.items() if t.verdict == verdict] for verdict in _VERBS}
    groups = {verdict: titles for verdict, titles in groups.items() if titles}
    if len(groups) == 1:
        return f"R^c {_VERBS[next(iter(groups))][0]} in all {len(trends)} forms"
    return listed([f"{listed(titles)} {_VERBS[verdict][len(titles) > 1]}" for verdict, titles in groups.items()])


def _against_random(own: Mapping[str, Trend], random: Mapping[str, Trend] | None, is_random: bool) -> list[str]:
    """Whether what is predicted happens without training, too."""
    if random is None:
        return []
    falling = [name for name, found in own.items() if found.verdict == "falls"]
    too = [MEASURES[name].title for name in falling if random[name].verdict == "falls"]
    if is_random:
        lesson = "The model itself has random initialisation, so both show what chance gives."
    elif not falling:
        lesson = "So the prediction does not hold, regardless of random initialisation."
    elif not too:
        lesson = "Where R^c falls here, it does not fall with random initialisation: the fall was learned."
    elif len(too) == len(falling):
        lesson = "So the fall alone is no evidence of learning."
    else:
        lesson = f"So the fall of {listed(too)} was not learned; any other fall was."
    return [f"With random initialisation, {_tally(random)}. {lesson}"]


def _collapse(model: SubjectMeasures) -> list[str]:
    """Whether a fall could be that of tokens which become alike."""
    found = trend(model.find("token_diversity", "z_next"))
    if found is None:
        return []
    lesson = (
        "Tokens become more similar, which lowers every rate without sorting anything."
        if found.verdict == "falls"
        else "Tokens do not become more similar, so no rate falls for that reason."
    )
    return [f"Share of the tokens’ energy in differences between tokens of one image: {found}. {lesson}"]


def _black_boxes(inspection: Inspection, stand_ins: Mapping[str, Trend]) -> list[str]:
    """What value projections show of the networks without subspaces, and what they do not."""
    found = [
        f"{_capitalised(subject.label)}, a black box, with value projections instead of subspaces: "
        f"{stand_ins[subject.key]}."
        for subject in inspection.measured[1:]
        if subject.key in stand_ins and subject.key in NETWORKS
    ]
    for key, control in (("model", "random"), ("baseline", "random_baseline")):
        if key in stand_ins and control in stand_ins:
            trained, random = stand_ins[key].verdict, stand_ins[control].verdict
            verb = _VERBS[random][0]
            found.append(
                f"With random initialisation that stand-in {verb} as well: its direction alone is no evidence of "
                "learning."
                if trained == random
                else f"With random initialisation that stand-in {verb}: the difference was learned."
            )
    return [*found, STAND_IN_LIMITS] if stand_ins else []


def _sparser(trends: Mapping[str, Trend]) -> str:
    """Such as "sparser by Gini index, denser by l1/l2"."""
    groups: dict[str, list[str]] = {"sparser": [], "denser": [], "neither sparser nor denser": []}
    for name, found in trends.items():
        measure = MEASURES[name]
        sparser = "rises" if measure.better == "higher" else "falls"
        verdict = "neither sparser nor denser" if found.verdict == "unclear" else "denser"
        groups["sparser" if found.verdict == sparser else verdict].append(measure.title)
    return ", ".join(f"{verdict} by {listed(names)}" for verdict, names in groups.items() if names)


def _held_on(rows: Sequence[AuditRow], tokens: str) -> str:
    """What holds where on one kind of tokens, such as "On all tokens: Attention lowers R^c (E0 and E2)."."""
    held = []
    for found in by_claim(row for row in rows if row.tokens == tokens).values():
        places = [short_place(row.part, row.layer) for row in found if row.is_met]
        if places:
            held.append(f"{found[0].text} ({'in every layer' if len(places) == len(found) else listed(places)})")
    if not held:
        return f"{_TOKENS[tokens]}: no claim holds in any layer."
    return f"{_TOKENS[tokens]}: {'; '.join(held)}. No other claim holds."


def _rates_table(inspection: Inspection, trends: Trends, stand_ins: Mapping[str, Trend]) -> Table | None:
    """The trends of R^c; a stand-in has those of unit-length projections alone. None if no network has any."""
    if not trends and not stand_ins:
        return None
    as_official = {key: {_RATES[-1]: found} for key, found in stand_ins.items()}
    caption = "R^c after the attention step, first → last encoder layer, in nats"
    return _trend_table(inspection, {**as_official, **trends}, _RATES, caption, marked=stand_ins)


def _trend_table(
    inspection: Inspection, trends: Trends, measures: Sequence[str], caption: str, marked: Iterable[str] = ()
) -> Table:
    """A row for each subject with a trend; those that are marked have a stand-in."""

    def cell(found: Trend | None) -> str:
        return "–" if found is None else f"{found.ends}\n{found.direction}"

    lines = [
        [
            subject.label + ("\n(stand-in)" if subject.key in marked else ""),
            *(cell(own.get(name)) for name in measures),
        ]
        for subject in inspection.measured
        if (own := trends.get(subject.key))
    ]
    return Table(["", *(MEASURES[name].title for name in measures)], lines, caption)


def _claims_table(inspection: Inspection) -> Table:
    """In how many layers each claim holds, for the model and each control that was audited."""
    columns = {
        found.label + {"all": "", "visible": ", as in training"}[tokens]: by_claim(
            row for row in found.measures.audit if row.tokens == tokens
        )
        for found in inspection.measured
        for tokens in dict.fromkeys(row.tokens for row in found.measures.audit)
    }
    lines = []
    for key, rows in next(iter(columns.values())).items():
        counted = [claims.get(key, []) for claims in columns.values()]
        counts = [f"{sum(row.is_met for row in found)} of {len(found)}" if found else "–" for found in counted]
        lines.append([rows[0].text, *counts])
    caption = "Layers in which each claim holds. Random initialisations are a control on DATA alone"
    return Table(["claim", *columns], lines, caption)


def removals_finding(removals: Sequence[Removal]) -> Finding:
    """Whether single heads and atoms matter, and more than random parts of the same size."""
    matter = mattering(removals)
    statements = []
    for kind, control in (("head", "random subspaces do"), ("atom", "random sets of atoms do")):
        if asked := [each for each in removals if each.kind == kind]:
            count = sum(each.kind == kind for each in matter)
            statements.append(f"{count} of {plural(len(asked), kind)} cost more than {control}")
    more = [
        "A head's step, or an atom's activations, is set to zero in every pass. The controls are random subspaces "
        "of a head's dimension, which have the size of an average head, and random sets of other atoms of the same "
        f"size as the atom. A part matters if removing it costs more than another random draw, with p < {LARGEST_P} "
        "(one-sided, Student's t over draws) after Holm's correction over all parts. The interval is for "
        "the difference from another draw, without this correction.",
        "Size is the share of the squared length: of an atom in its layer's code, of a head in its layer's steps.",
    ]
    probed = [each for each in removals if each.accuracy is not None]
    if probed:
        worst = min(probed, key=lambda each: each.accuracy or 0.0)
        more.append(
            f"The classifier, fitted once to the intact model, loses most when {_part(worst)} is removed: "
            f"{_points(worst.accuracy)} (controls: {_points(worst.random_accuracy)}); most of all on images of "
            f"{worst.worst_class}: {_points(worst.worst_class_accuracy)}. The minimum of many values is low by chance."
        )
    answer = f"Removed one at a time, {listed(statements)}."
    return Finding(
        "matters", "What matters: heads and atoms removed", answer, more=tuple(more), table=_removals_table(removals)
    )


def _removals_table(removals: Sequence[Removal]) -> Table:
    """What costs most beyond its controls."""
    header = ["without", "size", "change of the loss", "random", "difference", "95% interval", "accuracy", "random"]
    rows = [
        [
            _part(each),
            percent(each.share, 1),
            signed(each.loss),
            signed(each.random_loss),
            signed(each.beyond),
            f"{signed(each.beyond_low)} to {signed(each.beyond_high)}",
            _points(each.accuracy),
            _points(each.random_accuracy),
        ]
        for each in sorted(removals, key=lambda each: -each.beyond)[:_MOST_REMOVALS]
    ]
    return Table(
        header, rows, f"The {len(rows)} parts that cost most beyond their controls; all are in interventions.csv."
    )


def _part(removal: Removal) -> str:
    return f"{removal.kind} {removal.index} of {short_place(removal.part, removal.layer)}"


def _points(change: float | None) -> str:
    return "–" if change is None else f"{100 * change:+.1f} points".replace("-", "−")


def _use_table(use: Sequence[AttentionUse]) -> Table:
    lines = []
    for found in use:
        if not found.part:
            where = "nothing changed"
        else:
            where = f"all of the {found.part}" if found.layer is None else short_place(found.part, found.layer)
        low, high = found.change_low, found.change_high
        change = "–" if not found.part or low is None or high is None else f"{signed(low)} to {signed(high)}"
        score = "–"
        if found.accuracy is not None and found.accuracy_low is not None and found.accuracy_high is not None:
            score = f"{percent(found.accuracy)} ({percent(found.accuracy_low)} to {percent(found.accuracy_high)})"
        lines.append([where, number(found.loss), signed(found.change), change, score])
    return Table(
        ["no mixing in", "masked loss", "change", "95% interval", "linear probe"],
        lines,
        "Each row has P = I in these layers; changes of the loss are paired, image by image",
    )


def _more(rows: Sequence[Row], control: Sequence[Row]) -> str:
    """In how many layers a measure is larger than its control, such as "4 of 6 layers"."""
    pairs = list(zip(rows, control, strict=True))
    return f"{sum(a.mean > b.mean for a, b in pairs)} of {plural(len(pairs), 'layer')}"


def _mean(rows: Sequence[Row]) -> str:
    return number(fmean(row.mean for row in rows)) if rows else "–"


def _ends(measure: str, rows: Sequence[Row]) -> str:
    text = MEASURES[measure].format
    return f"{text(rows[0].mean)} → {text(rows[-1].mean)}" if rows else "–"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
