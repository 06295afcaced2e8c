"""What the numbers say of single layers, in plain words: their steps, their inverses, and what they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from crate_mae.drawing.page import table
from crate_mae.interpret.audit import AuditRow
from crate_mae.interpret.report.audit_table import by_subject, claims_of
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.probes import ACCURACY
from crate_mae.interpret.report.wording import Finding, course, number, percent, plural, rates_set
from crate_mae.interpret.statistics import Row

# Measure: its name, and what that of its control ends in.
INVERSES = {
    "inverse_cosine": ("Input brought back, cosine", "_identity"),
    "inverse_error_scaled": ("Error after the best scale", "_identity"),
    "inverse_dictionary_cosine": ("Dictionaries D and E, cosine", "_control"),
    "inverse_operator_cosine": ("W E<sup>⊤</sup> and the identity, cosine", "_control"),
    "inverse_subspace_affinity": ("Subspaces of both, affinity", "_control"),
}
KEPT: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "pixels told by tokens, R²": ("pixel_r2", "z_next", number),
    "rank of images’ features": ("feature_rank", "z_next", number),
    "dead coordinates": ("dead_coordinates", "", percent),
    "linear probe": (ACCURACY, "", percent),
}


def steps_finding(inspection: Inspection) -> Finding:
    """Does each step do what it was derived to do?"""
    anchor, question = "steps", "Does each step of a layer do what it was derived to do?"
    claims = claims_of(inspection.model.measures.audit)
    if not claims:
        answer = "The claims are about MSSA and ISTA, which this model does not have."
        return Finding(anchor=anchor, question=question, answer=answer)
    held = {name: _layers_held(rows) for name, rows in claims.items()}
    everywhere = [rates_set(rows[0].claim) for name, rows in claims.items() if held[name] == len(rows)]
    nowhere = [rates_set(rows[0].claim) for name, rows in claims.items() if held[name] == 0]
    more = [f"In every layer: {'; '.join(everywhere)}."] if everywhere else []
    more += [f"In no layer: {'; '.join(nowhere)}."] if nowhere else []
    return Finding(
        anchor=anchor,
        question=question,
        answer=f"Of {plural(len(claims), 'claim')} about single steps, {len(everywhere)} hold in every layer, "
        f"{len(claims) - len(everywhere) - len(nowhere)} in some and {len(nowhere)} in none.",
        more=(*more, *_against_random(inspection, held)),
        table=by_subject(inspection),
    )


def inverses_finding(inspection: Inspection) -> Finding:
    """Does the decoder undo the encoder?"""
    anchor, question = "inverses", "Does the decoder undo the encoder, layer by layer?"
    model = inspection.model
    own, idle = model.find("inverse_cosine"), model.find("inverse_cosine_identity")
    if not own:
        reason = model.measures.left_out.get("inverses", "it was not measured")
        return Finding(anchor=anchor, question=question, answer=f"This cannot be asked here: {reason}.")
    more = []
    for measure, (name, suffix) in INVERSES.items():
        rows, control = model.find(measure), model.find(f"{measure}_control")
        if suffix == "_control" and rows and control:
            more.append(
                f"{name}: larger for a layer’s own partner than for other decoder layers in {_more(rows, control)}."
            )
    return Finding(
        anchor=anchor,
        question=question,
        answer="Given an encoder layer’s output, its decoder layer comes nearer to the layer’s input than doing "
        f"nothing does in {_more(own, idle)} (cosine {_mean(own)} against {_mean(idle)}, means over layers).",
        more=tuple(more),
        table=_inverses_table(inspection),
    )


def information_finding(inspection: Inspection) -> Finding:
    """What is kept on the way?"""
    anchor, question = "information", "What is kept on the way through the encoder?"
    pixels = course(inspection.model.find("pixel_r2", "z_next"))
    if pixels is None:
        answer = "How much of the pixels tokens still tell was not measured; see what is left out."
        return Finding(anchor=anchor, question=question, answer=answer)
    more = []
    if probe := inspection.model.find(ACCURACY):
        best = max(probe, key=lambda row: row.mean)
        more.append(
            f"A linear probe is best on layer {best.layer}: {percent(best.mean)} right, and "
            f"{percent(probe[-1].mean)} on the last layer."
        )
    if dead := inspection.model.find("dead_coordinates"):
        worst = max(dead, key=lambda row: row.mean)
        most = f"Layer {worst.layer} has most dead coordinates: {percent(worst.mean)}."
        more.append(most if worst.mean > 0 else "No coordinate is dead in any layer.")
    columns = {name: how for name, how in KEPT.items() if any(found.find(*how[:2]) for found in inspection.measured)}
    lines = [
        [found.label, *(_ends(found.find(measure, point), text) for measure, point, text in columns.values())]
        for found in inspection.measured
    ]
    return Finding(
        anchor=anchor,
        question=question,
        answer=f"A linear map from a token to its own patch explains {percent(pixels.first)} of the pixels’ variance "
        f"after the first encoder layer, and {percent(pixels.last)} after the last.",
        more=tuple(more),
        table=table(["", *columns], lines, "First → last encoder layer"),
    )


def _against_random(inspection: Inspection, held: dict[str, int]) -> list[str]:
    random = inspection.subject("random")
    if random is None:
        return []
    control = {name: _layers_held(rows) for name, rows in claims_of(random.measures.audit).items()}
    more = sum(count > control[name] for name, count in held.items())
    fewer = sum(count < control[name] for name, count in held.items())
    return [
        f"Against random weights, {more} of them hold in more layers, {fewer} in fewer, and "
        f"{len(held) - more - fewer} in as many. Where a claim holds with random weights as well, at most the size of "
        "the change was learned."
    ]


def _layers_held(rows: Sequence[AuditRow]) -> int:
    return sum(row.holds for row in rows)


def _inverses_table(inspection: Inspection) -> str:
    networks = [found for found in inspection.measured if found.has_own_network and found.find("inverse_cosine")]
    header = ["", *(text for found in networks for text in (found.label, "its control"))]
    lines = [
        [name, *(_mean(found.find(measure + end)) for found in networks for end in ("", suffix))]
        for measure, (name, suffix) in INVERSES.items()
    ]
    return table(
        header, lines, "Means over layers. Controls: doing nothing on tokens, other decoder layers for weights"
    )


def _more(rows: Sequence[Row], control: Sequence[Row]) -> str:
    """In how many layers a measure is larger than its control, such as "4 of 6 layers"."""
    pairs = list(zip(rows, control, strict=True))
    return f"{sum(a.mean > b.mean for a, b in pairs)} of {plural(len(pairs), 'layer')}"


def _mean(rows: Sequence[Row]) -> str:
    return number(fmean(row.mean for row in rows)) if rows else "–"


def _ends(rows: Sequence[Row], text: Callable[[float], str]) -> str:
    return f"{text(rows[0].mean)} → {text(rows[-1].mean)}" if rows else "–"
