"""What the numbers say of single layers, in plain words: their steps, their inverses, and what they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from crate_mae.drawing.page import table
from crate_mae.interpret.attention_use import AttentionUse
from crate_mae.interpret.audit import COMPRESS, COMPRESS_NORMALISED, COMPRESS_UNIT, SORT, AuditRow
from crate_mae.interpret.layer_measures import LENGTH_RATIO
from crate_mae.interpret.report.audit_table import by_subject, claims_of, is_met, place_of
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.probes import ACCURACY
from crate_mae.interpret.report.wording import Finding, listed, number, percent, plural, rates_set, trend
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
    """Which steps beat their controls."""
    anchor, title = "steps", "Each step against its controls"
    rows = inspection.model.measures.audit
    if not rows:
        answer = "The claims are about attention in subspaces and sparse coding, which this model does not have."
        return Finding(anchor=anchor, title=title, answer=answer)
    more = [_of_tokens(rows, tokens) for tokens in dict.fromkeys(row.tokens for row in rows)]
    broken = [f"{rates_set(row.text)} ({place_of(row)})" for row in rows if row.status == "contradiction"]
    if broken:
        more.insert(
            0,
            f"<b>Contradiction: an image contradicts a theorem, so that a layer has a bug. {'; '.join(broken)}.</b>",
        )
    theorems = list(dict.fromkeys(rates_set(row.text) for row in rows if row.status == "theorem"))
    if theorems:
        more.append(f"Theorems of this model’s layers: {'; '.join(theorems)}.")
    held = sum(is_met(row) for row in rows)
    return Finding(
        anchor=anchor,
        title=title,
        answer=f"Of {plural(len(rows), 'claim')} about single steps of single layers, {held} hold: "
        "there the step beats the best of its controls in nearly every image, by a margin that counts.",
        more=tuple(more),
        table=by_subject(inspection),
    )


def lengths_finding(inspection: Inspection) -> Finding:
    """Whether attention steps shrink tokens, or sort them."""
    anchor, title = "lengths", "Shrinking and sorting"
    model = inspection.model
    ratios = model.find(LENGTH_RATIO)
    if not ratios:
        return Finding(anchor=anchor, title=title, answer="This model has no attention in subspaces.")
    audit = {(row.claim, row.layer): row for row in model.measures.audit if row.tokens == "all"}
    lines = [
        [
            f"E{row.layer}",
            percent(row.mean),
            *(_change(audit.get((key, row.layer))) for key in (COMPRESS, COMPRESS_NORMALISED, COMPRESS_UNIT)),
            _margin(audit.get((SORT, row.layer))),
        ]
        for row in ratios
    ]
    sorts = sum(is_met(row) for (key, _), row in audit.items() if key == SORT)
    return Finding(
        anchor=anchor,
        title=title,
        answer=f"The attention step changes the length of tokens to {listed([percent(row.mean) for row in ratios])} of "
        f"what it was, layer by layer, and sorts tokens in {sorts} of {plural(len(ratios), 'layer')}.",
        more=(
            "A step that only shrinks tokens lowers R<sup>c</sup> as it is, and leaves that of unit-length projections "
            "alone. A step sorts if R, at an equal fall of R<sup>c</sup>, falls less than by plain shrinking of all "
            "tokens and by uniform attention.",
        ),
        table=table(
            [
                "",
                "length after / before",
                "R<sup>c</sup> as it is",
                "normalised",
                "unit length",
                "sorting margin (nats)",
            ],
            lines,
            "Change in the attention step, nats per image; the sorting margin is over all images",
        ),
    )


def attention_finding(inspection: Inspection) -> Finding:
    """Whether the network needs tokens to be mixed."""
    anchor, title = "mixing", "Use of attention"
    use = inspection.attention_use
    own, uniform = (inspection.model.find(name) for name in ("self_attention", "self_attention_uniform"))
    if not use or not own:
        answer = "Attention without mixing is measured of autoencoders with attention in subspaces alone."
        return Finding(anchor=anchor, title=title, answer=answer)
    whole = next(found for found in use if found.part == "encoder" and found.layer is None)
    shares = listed([percent(row.mean) for row in own])
    return Finding(
        anchor=anchor,
        title=title,
        answer=f"Without mixing in the encoder (P = I in all layers) the loss on hidden patches changes by "
        f"{number(whole.change)}, from {number(use[0].loss)}{_accuracies(use[0], whole)}.",
        more=(
            f"A token gives {shares} of its attention to itself, layer by layer; uniform attention gives "
            f"{percent(uniform[0].mean)}. A layer whose loss and probe stay the same works on single tokens.",
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
        return Finding(anchor=anchor, title=title, answer=f"Not measured: {reason}.")
    more = []
    for measure, (name, suffix) in INVERSES.items():
        rows, control = model.find(measure), model.find(f"{measure}_control")
        if suffix == "_control" and rows and control:
            more.append(
                f"{name}: larger for a layer’s own partner than for other decoder layers in {_more(rows, control)}."
            )
    return Finding(
        anchor=anchor,
        title=title,
        answer="Given an encoder layer’s output, its decoder layer comes nearer to the layer’s input than doing "
        f"nothing does in {_more(own, idle)} (cosine {_mean(own)} against {_mean(idle)}, means over layers).",
        more=tuple(more),
        table=_inverses_table(inspection),
    )


def information_finding(inspection: Inspection) -> Finding:
    """What is kept on the way through the encoder."""
    anchor, title = "information", "Information kept through the encoder"
    pixels = trend(inspection.model.find("pixel_r2", "z_next"))
    if pixels is None:
        answer = "How much of the pixels tokens still tell was not measured; see what is left out."
        return Finding(anchor=anchor, title=title, answer=answer)
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
        title=title,
        answer=f"A linear map from a token to its own patch explains {percent(pixels.first)} of the pixels’ variance "
        f"after the first encoder layer, and {percent(pixels.last)} after the last.",
        more=tuple(more),
        table=table(["", *columns], lines, "First → last encoder layer"),
    )


def _of_tokens(rows: Sequence[AuditRow], tokens: str) -> str:
    """What holds where on one kind of tokens, such as "On all tokens: Attention lowers R^c (E0 and E2)."."""
    name = {"all": "On all tokens", "visible": "On tokens as in training"}[tokens]
    held = {}
    for found in claims_of([row for row in rows if row.tokens == tokens]).values():
        places = [f"{row.part[0].upper()}{row.layer}" for row in found if is_met(row)]
        if places:
            held[rates_set(found[0].text)] = "in every layer" if len(places) == len(found) else listed(places)
    if not held:
        return f"{name}: no claim holds in any layer."
    return f"{name}: {'; '.join(f'{text} ({places})' for text, places in held.items())}. No other claim holds."


def _change(row: AuditRow | None) -> str:
    return "–" if row is None else number(row.after - row.before)


def _margin(row: AuditRow | None) -> str:
    return "–" if row is None else f"{number(row.margin)} over {row.closest_control}"


def _accuracies(intact: AttentionUse, without: AttentionUse) -> str:
    if intact.accuracy is None or without.accuracy is None:
        return ""
    gave, gives = percent(intact.accuracy), percent(without.accuracy)
    return f", and a linear probe of the last layer gives {gives} where it gave {gave}"


def _use_table(use: Sequence[AttentionUse]) -> str:
    lines = []
    for found in use:
        where = "nothing changed" if not found.part else f"{found.part[0].upper()}{found.layer}"
        if found.part and found.layer is None:
            where = f"all of the {found.part}"
        low, high = found.change_low, found.change_high
        change = "–" if low is None or high is None else f"{number(low)} to {number(high)}"
        score = "–"
        if found.accuracy is not None and found.accuracy_low is not None and found.accuracy_high is not None:
            score = f"{percent(found.accuracy)} ({percent(found.accuracy_low)} to {percent(found.accuracy_high)})"
        lines.append([where, number(found.loss), number(found.change), change if found.part else "–", score])
    return table(
        ["no mixing in", "masked loss", "change", "95% interval", "linear probe"],
        lines,
        "Each row has P = I in these layers; changes of the loss are paired, image by image",
    )


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
