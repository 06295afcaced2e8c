"""What pretraining on a few thousand images of one's own gives, against what costs nothing: three seeds.

    python results/own_images/measure.py NAME DATA RUNS --epochs 40

DATA has a folder for each class. Every fifth image of a class, by name, is for measuring; the others are what
`pretrain` sees, with its defaults, for so many epochs: from random initialisation, and from the bundled model. The
features of these models are probed, next to those of the same network untrained, of raw pixels, and of the bundled
model as it is; the layer is chosen on a tenth of the training images. Then a tenth of the labels fine-tunes each of
these networks, for as many steps. Results: NAME.csv.

The rule, written before the runs: `--init-from` the bundled model becomes the default if its linear probe is better
than that from random initialisation by more than twice the standard error of the difference, on each of flowers, X-rays
and textures.
"""

import argparse
import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import crate_mae
from crate_mae.data.files import write_whole
from crate_mae.models.weights import initialised

SEEDS = (0, 1, 2)
BUNDLED = "crate_mae_micro_monotone_cifar10"
SCRATCH, FROM_BUNDLED, UNTRAINED = "from random initialisation", "from the bundled model", "untrained"
ONE_CORE: dict[str, Any] = {"threads": 1, "workers": 0, "quiet": True}

Row = dict[str, Any]


def main() -> None:
    """Make what is missing, and write the table of what exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--image-size", type=int, help="by default that of `pretrain`, for which one core is too slow at 224"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, epochs = options.runs, options.epochs
    size = {} if options.image_size is None else {"image_size": options.image_size}
    parts = split(options.data, runs / "data")
    table: list[Row] = []

    def note(entry: str, seed: int | str, make: Callable[[], list[Row]], what: str = "probes") -> None:
        """Make these rows, or read them, and write the table so far."""
        path = runs / f"{entry}_{seed}_{what}.json".replace(" ", "_")
        if not path.exists():
            write_whole(path, json.dumps(make(), indent=1).encode())
        table.extend({"entry": entry, "seed": seed, **row} for row in json.loads(path.read_text()))
        with (Path(__file__).parent / f"{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["entry", "seed", "measure", "layer", "accuracy", "low", "high"])
            writer.writeheader()
            writer.writerows(table)

    for seed in SEEDS:
        models = {
            SCRATCH: pretrained(parts[0], runs / f"scratch_{seed}", epochs, seed, **size),
            FROM_BUNDLED: pretrained(parts[0], runs / f"bundled_{seed}", epochs, seed, init_from=BUNDLED, **size),
            UNTRAINED: untrained(runs / f"untrained_{seed}", runs / f"scratch_{seed}", seed),
        }
        for entry, model in models.items():
            note(entry, seed, partial(probed, model, parts))
            out = runs / f"{model.name}_tuned"
            note(entry, seed, partial(tuned, model, parts, out, epochs, seed), "tuned")
    note("the bundled model as it is", "", partial(probed, BUNDLED, parts))
    note("pixels", "", partial(probed, "pixels", parts))


def split(data: Path, out: Path) -> tuple[Path, Path]:
    """Folders of links: every fifth image of a class is in the second."""
    parts = out / "train", out / "val"
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        for number, image in enumerate(sorted(folder.iterdir())):
            link = parts[number % 5 == 0] / folder.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(image.resolve())
    return parts


def pretrained(train: Path, out: Path, epochs: int, seed: int, **start: Any) -> Path:
    """A run, made or read."""
    if not (out / "model.safetensors").exists():
        crate_mae.pretrain(train, out=out, epochs=epochs, seed=seed, **start, **ONE_CORE)
    return out


def untrained(out: Path, like: Path, seed: int) -> Path:
    """The network of a run with random initialisation."""
    if not out.exists():
        torch.manual_seed(seed)
        crate_mae.save(initialised(crate_mae.load(like).config), out)
    return out


def probed(model: str | Path, parts: tuple[Path, Path]) -> list[Row]:
    """Linear and k-NN accuracy of the layer that is chosen on training images."""
    rows = []
    for measure, evaluate in (("linear", crate_mae.eval_linear), ("k-NN", crate_mae.eval_knn)):
        found = evaluate(str(model), train=parts[0], val=parts[1], layer="all", controls=False, workers=0).report
        best = max(found["results"], key=lambda result: result["chosen_on"])
        top1 = best["top1"]
        rows.append(
            {
                "measure": measure,
                "layer": best["layer"],
                "accuracy": top1["value"],
                "low": top1["low"],
                "high": top1["high"],
            }
        )
    return rows


def tuned(model: Path, parts: tuple[Path, Path], out: Path, epochs: int, seed: int) -> list[Row]:
    """Accuracy after the last step of fine-tuning with a tenth of the labels: the best is chosen on what is asked."""
    run = crate_mae.finetune(
        model, train=parts[0], val=parts[1], out=out, epochs=epochs, seed=seed, labels=0.1, **ONE_CORE
    )
    accuracies = [row["val_accuracy"] for row in run.metrics() if row.get("val_accuracy") is not None]
    return [{"measure": "fine-tuned, a tenth of the labels", "accuracy": accuracies[-1]}]


if __name__ == "__main__":
    main()
