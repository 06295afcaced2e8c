"""What the numbers say, in plain words, whichever way they go: rates and sparsity through the encoder."""

from __future__ import annotations

from crate_mae.drawing.page import table
from crate_mae.interpret.report.findings_layers import information_finding, inverses_finding, steps_finding
from crate_mae.interpret.report.inspection import Inspection, Measured
from crate_mae.interpret.report.wording import Course, Finding, course, listed

RATE = "R<sup>c</sup>"
FORMS = {
    "subspace_rate": "of tokens as they are",
    "subspace_rate_normalised": "of normalised tokens",
    "subspace_rate_official": "as the official code takes it",
}
# Measure: its name, and the verdict that means sparser.
SPARSITY = {
    "zero_fraction": ("share of exact zeros", "rises"),
    "l1_to_l2": ("l1/l2", "falls"),
    "gini": ("Gini index", "rises"),
}
_VERBS = {"falls": "falls", "rises": "rises", "unclear": "shows no clear change"}


def write_findings(inspection: Inspection) -> list[Finding]:
    """A question and an answer each, in the order of the derivation."""
    return [
        rates_finding(inspection),
        sparsity_finding(inspection),
        steps_finding(inspection),
        inverses_finding(inspection),
        information_finding(inspection),
    ]


def rates_finding(inspection: Inspection) -> Finding:
    """Does R^c fall through the encoder?"""
    anchor, question = "compression", "Does the subspace rate fall through the encoder?"
    courses = _courses(inspection, {form: (form, "z_half") for form in FORMS})
    own = courses.get("model")
    if own is None:
        answer = f"This model’s attention is not MSSA: it has no subspaces, so {RATE} is not defined for it."
        return Finding(anchor=anchor, question=question, answer=answer)
    more = [*_against_random(own, courses.get("random"), inspection.model.is_fresh), *_collapse(inspection.model)]
    reduction = course(inspection.model.find("rate_reduction", "z_half"))
    if reduction is not None:
        more.append(f"The rate reduction R − {RATE} of tokens as they are, which the layers are to raise: {reduction}.")
    return Finding(
        anchor=anchor,
        question=question,
        answer=f"From the first encoder layer to the last, {RATE} {_tally(own)}.",
        more=tuple(more),
        table=_course_table(inspection, courses, FORMS, f"{RATE} after MSSA, first → last encoder layer, in nats"),
    )


def sparsity_finding(inspection: Inspection) -> Finding:
    """Do tokens become sparser with depth?"""
    courses = _courses(inspection, {measure: (measure, "z_next") for measure in SPARSITY})
    more = [
        f"{found.label[0].upper()}{found.label[1:]}: {_sparser(courses[found.key])}."
        for found in inspection.measured[1:]
    ]
    if inspection.model.find("zero_fraction", "z_next")[-1].mean == 0:
        more.append("There are no exact zeros in the last layer’s output.")
    names = {measure: name for measure, (name, _) in SPARSITY.items()}
    return Finding(
        anchor="sparsity",
        question="Do tokens become sparser with depth?",
        answer=f"From the first encoder layer to the last they become {_sparser(courses['model'])}.",
        more=tuple(more),
        table=_course_table(inspection, courses, names, "Outputs of layers, first → last encoder layer"),
    )


def _courses(inspection: Inspection, wanted: dict[str, tuple[str, str]]) -> dict[str, dict[str, Course]]:
    """The courses of each subject that has them all."""
    found = {}
    for subject in inspection.measured:
        courses = {name: course(subject.find(*place)) for name, place in wanted.items()}
        whole = {name: value for name, value in courses.items() if value is not None}
        if len(whole) == len(wanted):
            found[subject.key] = whole
    return found


def _course_table(
    inspection: Inspection, courses: dict[str, dict[str, Course]], columns: dict[str, str], caption: str
) -> str:
    lines = [
        [subject.label, *(f"{found.ends}<br>{found.direction}" for name in columns if (found := own[name]))]
        for subject in inspection.measured
        if (own := courses.get(subject.key))
    ]
    return table(["", *columns.values()], lines, caption)


def _tally(courses: dict[str, Course]) -> str:
    """Such as "falls of normalised tokens and rises of tokens as they are"."""
    groups = {verb: [FORMS[f] for f, c in courses.items() if c.verdict == verdict] for verdict, verb in _VERBS.items()}
    groups = {verb: forms for verb, forms in groups.items() if forms}
    if len(groups) == 1:
        return f"{next(iter(groups))} in all {len(courses)} forms"
    return listed([f"{verb} {listed(forms)}" for verb, forms in groups.items()])


def _against_random(own: dict[str, Course], random: dict[str, Course] | None, is_fresh: bool) -> list[str]:
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


def _collapse(model: Measured) -> list[str]:
    """Whether a fall could be that of tokens which become alike."""
    found = course(model.find("token_diversity", "z_next"))
    if found is None:
        return []
    if found.verdict == "falls":
        lesson = "Tokens become more alike, which lowers every rate without sorting anything."
    else:
        lesson = "Tokens do not become more alike, so that no rate falls for that reason."
    return [f"The share of the tokens’ energy in which tokens of one image differ: {found}. {lesson}"]


def _sparser(courses: dict[str, Course]) -> str:
    """Such as "sparser by Gini index, denser by l1/l2"."""
    groups: dict[str, list[str]] = {"sparser": [], "denser": [], "neither sparser nor denser": []}
    for measure, found in courses.items():
        name, sparser = SPARSITY[measure]
        if found.verdict == "unclear":
            groups["neither sparser nor denser"].append(name)
        else:
            groups["sparser" if found.verdict == sparser else "denser"].append(name)
    return ", ".join(f"{verdict} by {listed(names)}" for verdict, names in groups.items() if names)
