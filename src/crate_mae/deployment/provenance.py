"""Where a trained model comes from, read from the folder of its run: what its card tells."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from crate_mae.deployment.card import LICENSE
from crate_mae.models.presets import bundled_folder, list_bundled

# Columns of metrics.csv: what the card calls them, and how it writes them.
_MEASURES = {
    "held_out_loss": ("Loss on held-out images", "{:.4g}"),
    "val_loss": ("Loss on validation images", "{:.4g}"),
    "val_accuracy": ("Accuracy on validation images", "{:.1%}"),
}
_OPTIONS = ("epochs", "steps", "batch_size", "lr", "weight_decay", "mask_ratio", "precision", "seed")
_PACKAGES = ("crate-mae", "torch", "timm")


def provenance(model: Any) -> dict[str, str]:
    """What is known of a model's training, by heading: data, recipe, results, environment.

    Args:
        model: any form of MODEL. Only the folder of a run and a model in the package tell anything.
    """
    if str(model) in list_bundled():
        text = (bundled_folder(str(model)) / "README.md").read_text(encoding="utf-8")
        about = text.partition("\n\n")[2].partition("\n\n")[2].strip()  # below its title and its code
        return {"Training": about, LICENSE: "mit"}
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is None or not (options := _mapping(folder / "config.yaml")):
        return {}
    facts = {
        "Data": _short(options.get("data")),
        "Recipe": _recipe(options),
        "Results": "\n".join(f"- {line}" for line in (*_measured(folder), *_probed(folder))),
        "Environment": _environment(folder),
    }
    return {heading: text for heading, text in facts.items() if text}


def _recipe(options: Mapping[str, Any]) -> str:
    start = f"`crate-mae {options.get('command', 'pretrain')}` of `{options.get('model', 'a model of its own')}`"
    return ", ".join([start, *(f"{key} {options[key]}" for key in _OPTIONS if options.get(key) is not None)]) + "."


def _measured(folder: Path) -> Iterator[str]:
    try:
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return
    for column, (name, form) in _MEASURES.items():
        values = [(row["step"], float(row[column])) for row in rows if row.get(column)]
        if values:
            (first, before), (last, after) = values[0], values[-1]
            yield f"{name}: {form.format(before)} at step {first}, {form.format(after)} at step {last}."


def _probed(folder: Path) -> Iterator[str]:
    """What `crate-mae eval ... --out` has left in the folder."""
    for file in sorted(folder.glob("*.json")):
        found = _mapping(file)
        for result in found.get("results", []) if "probe" in found else []:
            if isinstance(top1 := result.get("top1"), dict):
                images = f"{found.get('val_images', 0):,} images of {_short(found.get('val'))}"
                yield f"{found['probe']} probe, layer {result.get('layer')}: {top1['value']:.1%} of {images}."


def _environment(folder: Path) -> str:
    found = _mapping(folder / "environment.json")
    packages = [f"{name} {found['packages'][name]}" for name in _PACKAGES if name in found.get("packages", {})]
    devices = found.get("gpus") or [found.get("processor")]
    return ", ".join([*packages, *(str(device) for device in devices if device)])


def _mapping(file: Path) -> dict[str, Any]:
    """A file of YAML or JSON that holds a mapping; else an empty one, since a card is no reason to fail."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(data: Any) -> str:
    """The end of a path: a card is public, and where a folder is on somebody's machine is not."""
    return "" if data is None else "/".join(str(data).replace("\\", "/").split("/")[-2:])
