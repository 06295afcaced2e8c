"""Draw the curves of a run: python results/curves.py RUN OUT.png.

Training and held-out loss, feature rank, and the sparsity and subspace rate of every encoder layer, by step.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes


def read(path: Path) -> np.ndarray:
    """A CSV file as a structured array; empty cells are NaN."""
    return np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")


def draw_losses(axes: Axes, metrics: np.ndarray) -> None:
    """Mean training loss between rows, and the loss on held-out images with fixed masks."""
    axes.plot(metrics["step"], metrics["loss"], color="0.65", linewidth=1, label="training, mean since the row before")
    held_out = metrics[~np.isnan(metrics["held_out_loss"])]
    axes.plot(held_out["step"], held_out["held_out_loss"], "o-", color="#0072b2", markersize=3, label="held-out images")
    axes.set_ylabel("masked mean squared error")
    axes.set_ylim(0, 1.05 * np.nanmax(metrics["loss"]))
    axes.legend(frameon=False)


def draw_rank(axes: Axes, metrics: np.ndarray) -> None:
    """Effective rank of the held-out images' features."""
    rows = metrics[~np.isnan(metrics["feature_rank"])]
    axes.plot(rows["step"], rows["feature_rank"], "o-", color="#0072b2", markersize=3)
    axes.set_ylabel("effective rank of features")
    axes.set_ylim(0, None)


def draw_layers(axes: Axes, layers: np.ndarray, measure: str, label: str) -> None:
    """One line per encoder layer, dark to light with depth."""
    rows = layers[layers["measure"] == measure]
    numbers = np.unique(rows["layer"])
    for number in numbers:
        line = rows[rows["layer"] == number]
        colour = plt.get_cmap("viridis")(number / max(1, len(numbers)))
        axes.plot(line["step"], line["value"], color=colour, label=f"layer {number + 1}")
    axes.set_ylabel(label)


def main() -> None:
    """Read a run and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    metrics, layers = read(arguments.run / "metrics.csv"), read(arguments.run / "layers.csv")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    draw_losses(axes[0, 0], metrics)
    draw_rank(axes[0, 1], metrics)
    draw_layers(axes[1, 0], layers, "zero_fraction", "share of exact zeros after ISTA")
    draw_layers(axes[1, 1], layers, "subspace_rate", r"subspace rate $R^c$ (nats)")
    axes[1, 1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="encoder")
    for below in axes[1]:
        below.set_xlabel("step")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
