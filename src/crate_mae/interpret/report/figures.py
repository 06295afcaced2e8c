"""All figures of a report: which there are, in which section, and drawn."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from matplotlib.figure import Figure

from crate_mae.interpret.report.curves import foreground_figures, layer_figures, weight_figures
from crate_mae.interpret.report.draw_curves import draw_curves
from crate_mae.interpret.report.inspection import Inspection
from crate_mae.interpret.report.panels import Curves
from crate_mae.interpret.report.pictures import Grid, attention_grids, completion_grid, draw_grid, token_grids

Plan: TypeAlias = Mapping[str, Sequence[Curves | Grid]]  # from a section's anchor to its figures


def plan_figures(inspection: Inspection) -> Plan:
    """The figures of each section, without those that there is nothing for."""
    completed = inspection.examples.completed
    return {
        "model": [completion_grid(completed)] if completed is not None else [],
        "layers": layer_figures(inspection),
        "weights": weight_figures(inspection),
        "attention": [*attention_grids(inspection), *foreground_figures(inspection)],
        "tokens": token_grids(inspection),
    }


def draw_figures(plan: Plan) -> dict[str, Figure]:
    """Every figure, by the name of its files."""
    figures = [figure for section in plan.values() for figure in section]
    return {f.name: draw_curves(f) if isinstance(f, Curves) else draw_grid(f) for f in figures}
