"""A figure for each claim."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from crate_mae.drawing.style import GREY, colour, draw_line, legend_above, marker, new_figure, panels
from crate_mae.interpret.theory.attention import Attention
from crate_mae.interpret.theory.denoising import Denoising, DenoisingPoint
from crate_mae.interpret.theory.diffusion import Diffusion, DiffusionRun
from crate_mae.interpret.theory.experiments import TheoryResults
from crate_mae.interpret.theory.ista import Ista
from crate_mae.interpret.theory.signal_to_noise import SignalToNoise
from crate_mae.interpret.theory.spread import Spread

STEP_NAMES = {
    "token": "gradient, each token alone",
    "cluster": "gradient, one cluster's tokens",
    "all": "gradient, all tokens at once",
    "attention": "attention with softmax",
}
OPERATOR_NAMES = {
    "threshold": "thresholded softmax, s = 1",
    "normalised": "thresholded, tokens normalised",
    "softmax": "softmax, s = 1",
    "network": "softmax, s = p$^{-1/2}$ (the network's)",
}
_GAP_LIMITS = (1e-9, 1e3)


def draw_theory(results: TheoryResults) -> dict[str, Figure]:
    """The figures, by the names of their files."""
    return {
        "denoising": draw_denoising(results.denoising),
        "attention": draw_attention(results.attention),
        "signal_to_noise": draw_signal_to_noise(results.signal_to_noise),
        "diffusion": draw_diffusion(results.diffusion),
        "ista": draw_ista(results.ista),
    }


def draw_denoising(results: Denoising) -> Figure:
    """Cosine with the denoiser's move, and what is left outside the own subspace."""
    figure = new_figure(11.0, 7.0)
    axes = panels(figure, 2, 3, sharey="row", sharex="col")
    columns: list[tuple[str, str, Sequence[DenoisingPoint], list[float]]] = [
        ("noise $\\sigma$", "d = h p = 32", results.by_noise, [p.noise_std for p in results.by_noise]),
        ("dimension d", "h p = 32", results.by_dimension, [p.d for p in results.by_dimension]),
        ("number of subspaces h", "d = h p", results.by_subspaces, [p.h for p in results.by_subspaces]),
    ]
    for column, (name, held, points, x) in enumerate(columns):
        top, bottom = axes[0, column], axes[1, column]
        for number, (key, label) in enumerate(STEP_NAMES.items()):
            _draw_spreads(top, x, [point.cosine[key] for point in points], number, label)
            _draw_spreads(bottom, x, [point.error[key] for point in points], number, label)
        for key, style in (("noisy", ":"), ("denoiser", "--")):
            label = "before any step" if key == "noisy" else "posterior mean (the best)"
            bottom.plot(x, [p.error[key].mean for p in points], style, color=GREY, label=label, linewidth=1.6)
        top.set_title(held)
        top.set_xscale("log", base=2)
        bottom.set_xlabel(name)
        bottom.set_xticks(x, [f"{value:g}" for value in x])
        bottom.minorticks_off()
        bottom.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("cosine with the denoiser's move")
    axes[1, 0].set_ylabel("share outside the own subspace")
    legend_above(figure, axes[1, 0], 3)
    return figure


def draw_attention(results: Attention) -> Figure:
    """Errors of the series, direction of the part that mixes tokens, and direction of whole steps."""
    figure = new_figure(14.0, 4.8)
    axes = panels(figure, 1, 3)[0]
    names = ["order 0", "order 1", "order 2", "softmax, s = 1", "softmax, s = p^-1/2"]
    families = (("orthogonal", results.orthogonal, "-"), ("coherent", results.coherent, "--"))
    for family, points, line in families:
        x = [point.radius for point in points]
        for number, name in enumerate(names):
            label = name.replace("p^-1/2", "p$^{-1/2}$") if family == "orthogonal" else "_"
            _draw_spreads(axes[0], x, [point.error[name] for point in points], number, label, linestyle=line)
            if name in points[0].mixing:
                _draw_spreads(axes[1], x, [point.mixing[name] for point in points], number, label, linestyle=line)
        for number, name in enumerate(points[0].descent):
            label = name.replace("p^-1/2", "p$^{-1/2}$") if family == "orthogonal" else "_"
            _draw_spreads(axes[2], x, [point.descent[name] for point in points], number, label, linestyle=line)
    for panel in axes:
        panel.set_xscale("log")
        panel.set_xlabel("a max ‖W$_k$‖² (the series converges below 1)")
        panel.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-5, 1e3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[1].set_ylabel("cosine of the part that mixes tokens")
    axes[1].set_title("solid: orthogonal subspaces; dashed: slightly coherent", color=GREY)
    axes[2].set_ylabel("cosine of the step with −∇R$^c$")
    axes[2].set_ylim(-1.05, 1.05)
    axes[2].axhline(0, color=GREY, linewidth=1)
    axes[2].legend(frameon=False, loc="center right")
    legend_above(figure, axes[0], 5)
    return figure


def draw_signal_to_noise(results: SignalToNoise) -> Figure:
    """Growth of the ratio through the layers, a panel for each operator."""
    figure = new_figure(11.0, 7.0)
    axes = panels(figure, 2, 2, sharex=True, sharey=True).ravel()
    layers = range(results.layers + 1)
    for panel, (operator, title) in zip(axes, OPERATOR_NAMES.items(), strict=True):
        curves = [curve for curve in results.curves if curve.operator == operator]
        for number, curve in enumerate(curves):
            growth = [ratio.mean / curve.ratio[0].mean for ratio in curve.ratio]
            style = {"color": colour(number), "marker": marker(number)}
            panel.plot(layers, growth, label=f"$\\sigma$ = {curve.noise_std:g}", markersize=5, **style)
        predicted = [curves[0].predicted ** layer for layer in layers]
        label = "predicted"
        panel.plot(layers, predicted, color=GREY, linestyle="--", linewidth=2.2, label=label, zorder=1)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(f"{title}; predicted {curves[0].predicted:.2f} a layer")
    for panel in axes[2:]:
        panel.set_xlabel("layer")
    for panel in axes[::2]:
        panel.set_ylabel("SNR / SNR at the start")
    legend_above(figure, axes[0], 8 if len(axes[0].lines) <= 8 else 5)
    return figure


def draw_diffusion(results: Diffusion) -> Figure:
    """For each example: tokens on their way forward, on their way back, and their angle to the nearest line."""
    figure = new_figure(11.0, 3.3 * len(results.runs))
    columns = 3
    for row, run in enumerate(results.runs):
        paths = np.asarray(run.paths)
        scope = "all tokens at once" if run.together else "each token alone"
        halves = (paths[: run.steps + 1], paths[run.steps :])
        for column, half in enumerate(halves):
            axes: Any = figure.add_subplot(
                len(results.runs), columns, columns * row + column + 1, projection="3d" if run.d == 3 else None
            )
            _draw_paths(axes, half, run)
            axes.set_title(("forward" if column == 0 else "reverse") + f": {run.name},\n{scope}", fontsize=10.5)
        angles: Any = figure.add_subplot(len(results.runs), columns, columns * row + 3)
        _draw_spreads(angles, range(run.steps + 1), run.forward, 0, "forward", marker="")
        _draw_spreads(angles, range(run.steps + 1), run.reverse, 1, "reverse", marker="", linestyle="--")
        angles.set_xlabel("step")
        angles.set_ylabel("degrees to nearest line")
        angles.set_ylim(bottom=0)
        angles.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        angles.spines[["top", "right"]].set_visible(False)
        angles.legend(frameon=False)
    return figure


def _draw_paths(axes: Any, half: np.ndarray, run: DiffusionRun) -> None:
    """Grey ways from hollow starts to filled ends, over the lines."""
    # Far tokens, on their lines anyway, would make the others small: the frame is that of the nearer nine tenths.
    reach = 1.1 * float(np.quantile(np.linalg.norm(np.asarray(run.paths)[0], axis=-1), 0.9))
    shown = np.linalg.norm(half, axis=-1).max(0) <= reach
    half = half[:, shown]
    for number, line in enumerate(np.asarray(run.bases)):
        ends = np.stack([-reach * line, reach * line], axis=-1)
        axes.plot(*ends, color=colour(number), linewidth=1.2, alpha=0.7)
    for token in range(half.shape[1]):
        axes.plot(*half[:, token].T, color="#777777", linewidth=0.7)
    axes.scatter(*half[0].T, s=12, facecolors="none", edgecolors=GREY, linewidths=0.7, label="start")
    axes.scatter(*half[-1].T, s=8, color="#000000", label="end")
    axes.set_aspect("equal")
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_xticks([])
    axes.set_yticks([])
    if run.d == 3:
        axes.set_zlim(-reach, reach)
        axes.set_zticks([])


def draw_ista(results: Ista) -> Figure:
    """Gap of the objective and agreement of the supports, by steps."""
    figure = new_figure(11.0, 4.8)
    gap, support = panels(figure, 1, 2)[0]
    step_sizes = list(dict.fromkeys(curve.step_size for curve in results.curves))
    for curve in results.curves:
        number = step_sizes.index(curve.step_size)
        start, line = ("A = X", "-") if curve.start == "tokens" else ("A = 0", "--")
        label = f"{start}, $\\eta$ = {curve.step_size:g}/‖D‖²"
        means = [min(max(value.mean, _GAP_LIMITS[0] / 10), _GAP_LIMITS[1] * 10) for value in curve.gap]
        style = {"color": colour(number), "marker": marker(number), "markersize": 5, "linestyle": line}
        gap.plot(results.steps, means, label=label, **style)
        _draw_spreads(support, results.steps, curve.support, number, label, linestyle=line)
    for panel in (gap, support):
        panel.set_xscale("log")
        panel.set_xticks(results.steps, [str(steps) for steps in results.steps])
        panel.minorticks_off()
        panel.set_xlabel("ISTA steps")
    gap.set_yscale("log")
    gap.set_ylim(*_GAP_LIMITS)
    gap.set_ylabel("(objective − minimum) / minimum")
    support.set_ylabel("agreement of the active codes")
    legend_above(figure, gap, 4)
    return figure


def _draw_spreads(
    axes: Any, x: Sequence[float | int], y: Sequence[Spread], number: int, label: str, **options: Any
) -> None:
    draw_line(axes, x, [value.mean for value in y], [value.std for value in y], number, label, **options)
