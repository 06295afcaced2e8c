"""What the numbers say, in plain words, whichever way they go: rates and sparsity through the encoder."""

from __future__ import annotations

from collections.abc import Sequence

from crate_mae.drawing.page import table
from crate_mae.interpret.audit import SPARSITY, AuditRow
from crate_mae.interpret.layer_measures import OFFICIAL_POINT, OFFICIAL_RATE, VALUE_RATE
from crate_mae.interpret.report.audit_table import is_met
from crate_mae.interpret.report.findings_layers import (
    attention_finding,
    information_finding,
    inverses_finding,
    lengths_finding,
    steps_finding,
)
from crate_mae.interpret.report.inspection import Inspection, Measured
from crate_mae.interpret.report.wording import Finding, Trend, listed, percent, plural, trend

RATE = "R<sup>c</sup>"
FORMS = {
    "subspace_rate": "of tokens as they are",
    "subspace_rate_normalised": "of normalised tokens",
    OFFICIAL_RATE: "as the official code takes it",
}
_PLACES = {form: (form, OFFICIAL_POINT if form == OFFICIAL_RATE else "z_half") for form in FORMS}
STAND_IN_LIMITS = (
    "A stand-in takes the value projection W<sub>v</sub> of each head for U<sub>k</sub>: values are what attention "
    "mixes and passes on, as MSSA does with U<sub>k</sub><sup>⊤</sup>z. It says whether the values of one image become "
    "more alike. It does not say that a network compresses: nothing in a black box is derived to lower it, tokens are "
    "compared there by other projections (queries and keys), and its height means nothing next to that of a network of "
    "another width."
)
# Measure: its name, and the verdict that means sparser.
SPARSER = {
    "zero_fraction": ("share of exact zeros", "rises"),
    "l1_to_l2": ("l1/l2", "falls"),
    "gini": ("Gini index", "rises"),
}
_VERBS = {"falls": "falls", "rises": "rises", "unclear": "shows no clear change"}


def write_findings(inspection: Inspection) -> list[Finding]:
    """A subject and a statement each, in the order of the derivation."""
    return [
        rates_finding(inspection),
        sparsity_finding(inspection),
        steps_finding(inspection),
        lengths_finding(inspection),
        attention_finding(inspection),
        inverses_finding(inspection),
        information_finding(inspection),
    ]


def rates_finding(inspection: Inspection) -> Finding:
    """How R^c changes through the encoder."""
    trends = _trends(inspection, _PLACES)
    stand_ins = _trends(inspection, {OFFICIAL_RATE: (VALUE_RATE, OFFICIAL_POINT)})
    own, more = trends.get("model"), []
    if own is not None:
        answer = f"From the first encoder layer to the last, {RATE} {_tally(own)}."
        more += [*_against_random(own, trends.get("random"), inspection.model.is_fresh), *_collapse(inspection.model)]
        if reduction := trend(inspection.model.find("pooled_rate_reduction", "z_next")):
            more.append(f"R − {RATE} of the tokens of all images, which the layers are to raise: {reduction}.")
    else:
        answer = f"This model’s attention is not MSSA: it has no subspaces, so {RATE} is not defined for it."
        if "model" in stand_ins:
            answer += f" With value projections in the place of subspaces: {stand_ins['model'][OFFICIAL_RATE]}."
    return Finding(
        anchor="compression",
        title="Subspace rate through the encoder",
        answer=answer,
        more=(*more, *_black_boxes(inspection, stand_ins)),
        table=_rates_table(inspection, trends, stand_ins),
    )


def sparsity_finding(inspection: Inspection) -> Finding:
    """Whether tokens become sparser with depth, and whether ISTA makes them so."""
    trends = _trends(inspection, {measure: (measure, "z_next") for measure in SPARSER})
    rows = [row for row in inspection.model.measures.audit if (row.claim, row.tokens) == (SPARSITY, "all")]
    more = [_against_relu(rows)] if rows else []
    more += [f"{_capitalised(found.label)}: {_sparser(trends[found.key])}." for found in inspection.measured[1:]]
    if inspection.model.find("zero_fraction", "z_next")[-1].mean == 0:
        more.append("There are no exact zeros in the last layer’s output.")
    names = {measure: name for measure, (name, _) in SPARSER.items()}
    return Finding(
        anchor="sparsity",
        title="Sparsity through the encoder",
        answer=f"From the first encoder layer to the last, outputs become {_sparser(trends['model'])}"
        f"{_than_relu(rows)}.",
        more=tuple(more),
        table=_trend_table(inspection, trends, names, "Outputs of layers, first → last encoder layer"),
    )


def _trends(inspection: Inspection, wanted: dict[str, tuple[str, str]]) -> dict[str, dict[str, Trend]]:
    """The trends of each subject that has them all."""
    found = {}
    for subject in inspection.measured:
        trends = {name: trend(subject.find(*place)) for name, place in wanted.items()}
        whole = {name: value for name, value in trends.items() if value is not None}
        if len(whole) == len(wanted):
            found[subject.key] = whole
    return found


def _black_boxes(inspection: Inspection, stand_ins: dict[str, dict[str, Trend]]) -> list[str]:
    """What value projections say of the networks without subspaces, and what they do not."""
    found = [
        f"{_capitalised(subject.label)}, a black box, with value projections in the place of subspaces: "
        f"{stand_ins[subject.key][OFFICIAL_RATE]}."
        for subject in inspection.measured[1:]
        if subject.key in stand_ins
    ]
    for trained, fresh in (("model", "random"), ("baseline", "random_baseline")):
        if trained in stand_ins and fresh in stand_ins:
            found.append(_learned(*(stand_ins[key][OFFICIAL_RATE] for key in (trained, fresh))))
    return [*found, STAND_IN_LIMITS] if stand_ins else []


def _learned(trained: Trend, fresh: Trend) -> str:
    """Whether the trend of a stand-in is one of training."""
    verb = _VERBS[fresh.verdict]
    if trained.verdict == fresh.verdict:
        return f"With random weights that stand-in {verb} as well: its direction alone shows nothing that was learned."
    return f"With random weights that stand-in {verb}: the difference was learned."


def _rates_table(
    inspection: Inspection, trends: dict[str, dict[str, Trend]], stand_ins: dict[str, dict[str, Trend]]
) -> str:
    """The table of the trends of R^c; empty if no network has any."""
    if not trends and not stand_ins:
        return ""
    marked = dict.fromkeys(stand_ins, "<br>(stand-in)")
    caption = f"{RATE} after the attention step, first → last encoder layer, in nats"
    return _trend_table(inspection, stand_ins | trends, FORMS, caption, marked)


def _trend_table(
    inspection: Inspection,
    trends: dict[str, dict[str, Trend]],
    columns: dict[str, str],
    caption: str,
    marks: dict[str, str] | None = None,
) -> str:
    def cell(found: Trend | None) -> str:
        return "–" if found is None else f"{found.ends}<br>{found.direction}"

    lines = [
        [subject.label + (marks or {}).get(subject.key, ""), *(cell(own.get(name)) for name in columns)]
        for subject in inspection.measured
        if (own := trends.get(subject.key))
    ]
    return table(["", *columns.values()], lines, caption)


def _tally(trends: dict[str, Trend]) -> str:
    """Such as "falls of normalised tokens and rises of tokens as they are"."""
    groups = {verb: [FORMS[f] for f, c in trends.items() if c.verdict == verdict] for verdict, verb in _VERBS.items()}
    groups = {verb: forms for verb, forms in groups.items() if forms}
    if len(groups) == 1:
        return f"{next(iter(groups))} in all {len(trends)} forms"
    return listed([f"{verb} {listed(forms)}" for verb, forms in groups.items()])


def _against_random(own: dict[str, Trend], random: dict[str, Trend] | None, is_fresh: bool) -> list[str]:
    """Whether what is promised happens without training, too."""
    if random is None:
        return []
    falling = [form for form, found in own.items() if found.verdict == "falls"]
    too = [FORMS[form] for form in falling if random[form].verdict == "falls"]
    if is_fresh:
        lesson = "The model’s own weights are fresh, so that both show what chance gives."
    elif not falling:
        lesson = "So the promise is not kept, whatever random weights do."
    elif not too:
        lesson = "So random weights do not make it fall where it falls here: training did."
    elif len(too) == len(falling):
        lesson = "So the fall by itself shows nothing that was learned."
    else:
        lesson = f"So the fall {listed(too)} shows nothing that was learned; the rest of it was."
    return [f"With random weights it {_tally(random)}. {lesson}"]


def _than_relu(rows: Sequence[AuditRow]) -> str:
    """In how many layers that is ISTA's doing."""
    if not rows:
        return ""
    return f"; ISTA makes more exact zeros than ReLU in {sum(map(is_met, rows))} of {plural(len(rows), 'layer')}"


def _against_relu(rows: Sequence[AuditRow]) -> str:
    """Exact zeros of ISTA, and those that relu(x) makes of the same input."""
    layers = [f"ISTA {percent(row.after)}, relu(x) {percent(row.before)} in layer {row.layer}" for row in rows]
    return f"Exact zeros: {'; '.join(layers)}. Where ISTA makes no more than relu(x), ReLU would be as sparse."


def _collapse(model: Measured) -> list[str]:
    """Whether a fall could be that of tokens which become alike."""
    found = trend(model.find("token_diversity", "z_next"))
    if found is None:
        return []
    if found.verdict == "falls":
        lesson = "Tokens become more alike, which lowers every rate without sorting anything."
    else:
        lesson = "Tokens do not become more alike, so that no rate falls for that reason."
    return [f"The share of the tokens’ energy in which tokens of one image differ: {found}. {lesson}"]


def _capitalised(label: str) -> str:
    return label[0].upper() + label[1:]


def _sparser(trends: dict[str, Trend]) -> str:
    """Such as "sparser by Gini index, denser by l1/l2"."""
    groups: dict[str, list[str]] = {"sparser": [], "denser": [], "neither sparser nor denser": []}
    for measure, found in trends.items():
        name, sparser = SPARSER[measure]
        if found.verdict == "unclear":
            groups["neither sparser nor denser"].append(name)
        else:
            groups["sparser" if found.verdict == sparser else "denser"].append(name)
    return ", ".join(f"{verdict} by {listed(names)}" for verdict, names in groups.items() if names)
