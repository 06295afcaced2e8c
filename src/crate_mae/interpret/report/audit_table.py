"""The audit as tables: every claim about every layer, in symbols that need no colour."""

from collections.abc import Sequence
from html import escape

from crate_mae.drawing.page import table
from crate_mae.interpret.audit import CLAIMS, CONTROLS, LEAST_MARGIN_SHARE, LEAST_SHARE_OF_IMAGES, AuditRow
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.wording import number, percent, rates_set

SYMBOLS = {"theorem": "∎", "holds": "✓", "does not hold": "✗", "contradiction": "‼"}
CLASSES = {"theorem": "theorem", "holds": "holds", "does not hold": "fails", "contradiction": "contradiction"}
LEGEND = (
    "∎ theorem: the layer guarantees it for all weights and images. ✓ holds: in at least "
    f"{percent(LEAST_SHARE_OF_IMAGES)} of the images the step beats the best of its controls, on average by at least "
    f"{percent(LEAST_MARGIN_SHARE)} of the value before the step, with p &lt; 0.05 after Holm’s correction over all "
    "claims and layers, and (but for the lasso) by more than in five untrained draws of the network. ✗ does not hold. "
    "‼ contradiction: an image contradicts a theorem, so that the layer has a bug. Below each symbol are the share of "
    "images in which the step beats all its controls, and the control that came closest."
)
TOKENS = {
    "all": "All tokens: nothing is hidden",
    "visible": "As in training: the encoder sees the visible patches alone, the decoder fills in the hidden ones",
}


def claims_of(rows: Sequence[AuditRow]) -> dict[str, list[AuditRow]]:
    """The rows by claim, in the order of the layers."""
    return {key: found for key in CLAIMS if (found := [row for row in rows if row.claim == key])}


def overview(rows: Sequence[AuditRow]) -> str:
    """Claims and layers: a symbol, share of images, closest control; a table for each part and kind of tokens."""
    tables = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        tables.append(f"<h3>{TOKENS[tokens]}</h3>\n")
        for part, letter in (("encoder", "E"), ("decoder", "D")):
            claims = claims_of([row for row in rows if (row.part, row.tokens) == (part, tokens)])
            if claims:
                layers = [row.layer for row in next(iter(claims.values()))]
                lines = [[rates_set(found[0].text), *map(_symbol, found)] for found in claims.values()]
                tables.append(table(["claim", *(f"{letter}{layer}" for layer in layers)], lines))
    return "".join(tables)


def all_numbers(rows: Sequence[AuditRow]) -> str:
    """For each claim a table of layers: the value, the margin over the closest control, and what is judged by them."""
    header = ["", "before", "after", "closest control", "margin", "95% interval"]
    header += ["of the value before", "images", "p (Holm)", "untrained", ""]
    tables = []
    for key, found in claims_of(rows).items():
        lines = [
            [
                place_of(row),
                number(row.before),
                number(row.after),
                escape(row.closest_control),
                number(row.margin),
                interval_of(row),
                _share(row.margin_share),
                images_of(row),
                number(row.p_holm),
                "–" if row.untrained is None else _share(row.untrained),
                f'<td class="{CLASSES[row.status]}">{SYMBOLS[row.status]} {row.status}</td>',
            ]
            for row in found
        ]
        caption = f"<b>{rates_set(found[0].text)}</b> ({rates_set(CLAIMS[key].value)})"
        tables.append(table(header, lines, caption))
    return "".join(tables)


def controls_table() -> str:
    """What each control is."""
    return table([], [[escape(name), rates_set(text)] for name, text in CONTROLS.items()])


def by_subject(inspection: Inspection) -> str:
    """In how many layers each claim holds, for the model and each control that was audited."""
    columns = {
        found.label + {"all": "", "visible": ", as in training"}[tokens]: claims_of(
            [row for row in found.measures.audit if row.tokens == tokens]
        )
        for found in inspection.measured
        for tokens in dict.fromkeys(row.tokens for row in found.measures.audit)
    }
    first = next(iter(columns.values()))
    lines = [
        [rates_set(rows[0].text), *(_count(claims.get(key, [])) for claims in columns.values())]
        for key, rows in first.items()
    ]
    return table(
        ["claim", *columns], lines, "Layers in which each claim holds. Untrained draws are a control on DATA alone"
    )


def place_of(row: AuditRow) -> str:
    """Such as "E0" and "D1, visible"."""
    return f"{row.part[0].upper()}{row.layer}" + (", visible" if row.tokens == "visible" else "")


def interval_of(row: AuditRow) -> str:
    """The 95% interval of the margin."""
    if row.margin_low is None or row.margin_high is None:
        return "none"
    return f"{number(row.margin_low)} to {number(row.margin_high)}"


def images_of(row: AuditRow) -> str:
    """The share of images in which the step beats all controls."""
    return "pooled" if row.share_of_images is None else percent(row.share_of_images)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", "−")


def _symbol(row: AuditRow) -> str:
    tip = f"{row.status}: margin {row.margin:.3g} over {row.closest_control}, {100 * row.margin_share:.1f}% of before"
    return (
        f'<td class="{CLASSES[row.status]}" title="{escape(tip)}">{SYMBOLS[row.status]}<br>{images_of(row)}'
        f'<br><span class="small">{escape(row.closest_control)}</span></td>'
    )


def _count(rows: Sequence[AuditRow]) -> str:
    return f"{sum(is_met(row) for row in rows)} of {len(rows)}" if rows else "–"


def is_met(row: AuditRow) -> bool:
    """Whether a claim is a theorem that stands, or holds as measured."""
    return row.status in ("theorem", "holds")
