"""Is it better to start from the bundled model than from random initialisation? Kinds of images, and three seeds.

    python results/own_images/start.py NAME DATA RUNS [--seeds 0 1 2]

DATA has a folder for each class, split as in `measure.py`. Each run has 1,000 steps of 32 whole images of 64 pixels
with normalised targets, as the bundled model was trained, and the defaults of `pretrain` otherwise: from random
initialisation, and from the bundled model, whose patches of 4 pixels become patches of 8. Beside them: the same network
with random initialisation, the bundled model as it is (at 32 pixels) and its network with random initialisation, and
pixels. Then each of these networks is fine-tuned for 300 steps with a tenth of the labels, which each seed chooses
anew. Results: start_NAME.csv.

The rule is that of `measure.py`: `--init-from` the bundled model becomes the default if its linear probe is better than
that from random initialisation by more than twice the standard error of the difference, on each of flowers, X-rays and
textures. For fine-tuning, a difference counts if its mean over three seeds, paired, is more than two standard errors.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import BUNDLED, FROM_BUNDLED, ONE_CORE, SCRATCH, SEEDS, Row, split, untrained

import crate_mae
from crate_mae.data.files import write_whole

ENTRIES: dict[str, dict[str, Any]] = {
    SCRATCH: {"model": "crate_mae_micro_wide_monotone_patch8_64"},
    FROM_BUNDLED: {"init_from": BUNDLED},
}
AS_IT_IS, RANDOM = "the bundled model as it is", "random initialisation"
SAME: dict[str, Any] = {"steps": 1000, "batch_size": 32, "image_size": 64, "norm_pix_loss": True, "min_crop": 1.0}
TUNING: dict[str, Any] = {"labels": 0.1, "steps": 300, "batch_size": 32, "monitor_steps": 100}
COLUMNS = ("entry", "seed", "measure", "layer", "accuracy", "chosen")

Measure = Callable[[str, tuple[Path, Path], int | str], Iterator[Row]]


def main() -> None:
    """Make what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.runs
    parts = split(options.data, runs / "data")
    rows: list[Row] = []

    def score(measure: Measure, entry: str, seed: int | str, model: str | Path) -> None:
        """Score a model, or read its scores, and write the table so far."""
        path = runs / f"{folder_name(entry)}_{seed}_{measure.__name__}.json"
        if not path.exists():
            write_whole(path, json.dumps(list(measure(str(model), parts, seed)), indent=1).encode())
        rows.extend({"entry": entry, "seed": seed, **row} for row in json.loads(path.read_text()))
        with (Path(__file__).parent / f"start_{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    score(probes, "pixels", "", "pixels")
    score(probes, AS_IT_IS, "", BUNDLED)
    score(probes, "the network of the bundled model with random initialisation", "", f"{BUNDLED}:untrained")
    for seed in options.seeds:
        models: dict[str, Path] = {}
        for entry, given in ENTRIES.items():
            models[entry] = runs / f"{folder_name(entry)}_{seed}"
            if not (models[entry] / "model.safetensors").exists():
                crate_mae.pretrain(parts[0], out=models[entry], seed=seed, **SAME, **given, **ONE_CORE)
        models[RANDOM] = untrained(runs / f"untrained_{seed}", models[SCRATCH], seed)
        for entry, model in models.items():
            score(probes, entry, seed, model)
        for entry, model in {**models, AS_IT_IS: BUNDLED}.items():
            score(fine_tuning, entry, seed, model)


def folder_name(entry: str) -> str:
    """Of its runs."""
    return entry.replace(" ", "_")


def probes(model: str, parts: tuple[Path, Path], _seed: int | str) -> Iterator[Row]:
    """Linear and k-NN accuracy of each layer, and which one is chosen on training images."""
    for measure, evaluate in (("linear", crate_mae.eval_linear), ("k-NN", crate_mae.eval_knn)):
        found = evaluate(model, train=parts[0], val=parts[1], layer="all", controls=False, workers=0)
        results = found.report["results"]
        best = max(results, key=lambda result: result["chosen_on"])
        for result in results:
            row = {"measure": measure, "layer": result["layer"], "accuracy": result["top1"]["value"]}
            yield row | {"chosen": result is best}


def fine_tuning(model: str, parts: tuple[Path, Path], seed: int | str) -> Iterator[Row]:
    """Accuracy after the last step: the best step would be chosen on the images that are asked."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "classifier"
        run = crate_mae.finetune(model, train=parts[0], val=parts[1], out=out, seed=int(seed), **TUNING, **ONE_CORE)
        accuracies = [row["val_accuracy"] for row in run.metrics() if row.get("val_accuracy") is not None]
    yield {"measure": "fine-tuned with a tenth of the labels", "accuracy": accuracies[-1]}


if __name__ == "__main__":
    main()
