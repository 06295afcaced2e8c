"""The picture of `benchmarks.steps`: how many times as fast, duel by duel."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.duels import Duel
from crate_mae.data.files import write_whole
from crate_mae.drawing.style import GREY, colour, encode, new_figure, panels


def draw_duels(duels: Sequence[Duel], path: Path) -> None:
    """Bars that start at 1, with quartiles; to the right the first of the two is faster."""
    figure = new_figure(9.0, 1.2 + 0.28 * len(duels))
    axes = panels(figure, 1, 1)[0, 0]
    places = range(len(duels), 0, -1)
    medians = [duel.ratio[1] for duel in duels]
    spread = [[d.ratio[1] - d.ratio[0] for d in duels], [d.ratio[2] - d.ratio[1] for d in duels]]
    colours = [colour(0 if duel.task == "training" else 1) for duel in duels]
    axes.barh(places, [m - 1 for m in medians], left=1, xerr=spread, color=colours, height=0.7)
    axes.set_yticks(places, [f"{d.size} {d.precision} {d.task}: {' / '.join(d.names)}" for d in duels], fontsize=9)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel("times as fast (median and quartiles)")
    write_whole(path, encode(figure, "png"))
