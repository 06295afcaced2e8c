"""Is it better to start from the bundled model than from random initialisation? Kinds of images, and three seeds.

    python results/own_images/start.py NAME DATA RUNS [--seeds 0 1 2]

DATA has a folder for each class, split as in `measure.py`. Each run has 1,000 steps of 32 whole images of 64 pixels
with normalised targets, as the bundled model was trained, and the defaults of `pretrain` otherwise: from random
initialisation, and from the bundled model, whose patches of 4 pixels become patches of 8. Beside them: the same network
with random initialisation, the bundled model as it is (at 32 pixels) and its network with random initialisation, and
pixels. Results: start_NAME.csv.

The rule is that of `measure.py`: `--init-from` the bundled model becomes the default if its linear probe is better than
that from random initialisation by more than twice the standard error of the difference, on each of flowers, X-rays and
textures.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import BUNDLED, FROM_BUNDLED, ONE_CORE, SCRATCH, SEEDS, split, untrained

import crate_mae
from crate_mae.data.files import write_whole

ENTRIES: dict[str, dict[str, Any]] = {
    SCRATCH: {"model": "crate_mae_micro_wide_monotone_patch8_64"},
    FROM_BUNDLED: {"init_from": BUNDLED},
}
SAME: dict[str, Any] = {"steps": 1000, "batch_size": 32, "image_size": 64, "norm_pix_loss": True, "min_crop": 1.0}


def main() -> None:
    """Make what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = split(options.data, options.runs / "data")
    rows: list[dict[str, Any]] = []

    def score(entry: str, seed: int | str, model: str | Path) -> None:
        """Score a model, or read its scores, and write the table so far."""
        path = options.runs / f"{folder_name(entry)}_{seed}.json"
        if not path.exists():
            write_whole(path, json.dumps(list(scores(str(model), parts)), indent=1).encode())
        rows.extend({"entry": entry, "seed": seed, **row} for row in json.loads(path.read_text()))
        with (Path(__file__).parent / f"start_{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    score("pixels", "", "pixels")
    score("the bundled model as it is", "", BUNDLED)
    score("the network of the bundled model with random initialisation", "", f"{BUNDLED}:untrained")
    for seed in options.seeds:
        for entry, given in ENTRIES.items():
            run = options.runs / f"{folder_name(entry)}_{seed}"
            if not (run / "model.safetensors").exists():
                crate_mae.pretrain(parts[0], out=run, seed=seed, **SAME, **given, **ONE_CORE)
            score(entry, seed, run)
            if entry == SCRATCH:
                score("random initialisation", seed, untrained(options.runs / f"untrained_{seed}", run, seed))


def folder_name(entry: str) -> str:
    """Of its runs."""
    return entry.replace(" ", "_")


def scores(model: str, parts: tuple[Path, Path]) -> Iterator[dict[str, Any]]:
    """Linear and k-NN accuracy of each layer, and which one is chosen on training images."""
    for measure, evaluate in (("linear", crate_mae.eval_linear), ("k-NN", crate_mae.eval_knn)):
        found = evaluate(model, train=parts[0], val=parts[1], layer="all", controls=False, workers=0)
        results = found.report["results"]
        best = max(results, key=lambda result: result["chosen_on"])
        for result in results:
            row = {"measure": measure, "layer": result["layer"], "accuracy": result["top1"]["value"]}
            yield row | {"chosen": result is best}


if __name__ == "__main__":
    main()
