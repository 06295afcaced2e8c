"""The audit as tables: every claim about every layer, in symbols that need no colour."""

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from crate_mae.drawing.page import table
from crate_mae.interpret.audit import CLAIMS, AuditRow
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.wording import number, percent, rates_set

Status = Literal["holds", "fails", "open"]

SYMBOLS: dict[Status, str] = {"holds": "✓", "fails": "✗", "open": "?"}
LEGEND = (
    "✓ holds: all of the 95% interval of the mean change has the promised sign; ✗ fails: all of it has the other sign; "
    "? open: the interval holds 0. Below each, the share of images in which the change has the promised sign."
)


def status(row: AuditRow) -> Status:
    """Whether a claim about a layer holds, fails, or cannot be told."""
    if row.holds:
        return "holds"
    if row.low is None or row.high is None or row.low <= 0 <= row.high:
        return "open"
    return "fails"


def claims_of(rows: Sequence[AuditRow]) -> dict[str, list[AuditRow]]:
    """The rows by claim, in the order of the layers."""
    return {name: found for name in CLAIMS if (found := [row for row in rows if row.measure == name])}


def overview(rows: Sequence[AuditRow]) -> str:
    """Claims and layers: a symbol, and the share of images. One table for each part, as their layers differ."""
    tables = []
    for part, letter in (("encoder", "E"), ("decoder", "D")):
        claims = claims_of([row for row in rows if row.part == part])
        if claims:
            layers = [row.layer for row in next(iter(claims.values()))]
            lines = [[rates_set(found[0].claim), *map(_symbol, found)] for found in claims.values()]
            tables.append(table(["claim", *(f"{letter}{layer}" for layer in layers)], lines))
    return "".join(tables)


def all_numbers(rows: Sequence[AuditRow]) -> str:
    """For each claim a table of layers: change, its interval, share of images with its interval, verdict."""
    header = ["layer", "change", "95% interval", "images", "95% interval", ""]
    tables = []
    for found in claims_of(rows).values():
        lines = [
            [
                f"{row.part[0].upper()}{row.layer}",
                number(row.change),
                "none" if row.low is None or row.high is None else f"{number(row.low)} to {number(row.high)}",
                percent(row.share),
                f"{percent(row.share_low)} to {percent(row.share_high)}",
                f'<td class="{status(row)}">{SYMBOLS[status(row)]} {status(row)}</td>',
            ]
            for row in found
        ]
        tables.append(table(header, lines, f"<b>{rates_set(found[0].claim)}</b>"))
    return "".join(tables)


def by_subject(inspection: Inspection) -> str:
    """In how many layers each claim holds, and by how much on average, for the model and each control."""
    subjects = [found for found in inspection.measured if found.measures.audit]
    claims = [claims_of(found.measures.audit) for found in subjects]
    lines = [
        [rates_set(rows[0].claim), *(_count(found.get(name, [])) for found in claims)]
        for name, rows in claims[0].items()
    ]
    return table(
        ["claim", *(found.label for found in subjects)],
        lines,
        "Layers in which each claim holds; below, the mean change over layers",
    )


def _symbol(row: AuditRow) -> str:
    found = status(row)
    return f'<td class="{found}" title="{found}, change {row.change:.3g}">{SYMBOLS[found]}<br>{percent(row.share)}</td>'


def _count(rows: Sequence[AuditRow]) -> str:
    if not rows:
        return "–"
    held = f"{sum(row.holds for row in rows)} of {len(rows)}"
    return f'{held}<br><span class="small">{number(fmean(row.change for row in rows))}</span>'
