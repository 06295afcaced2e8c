"""`README.md` of an exported folder: what goes in, what comes out, how to run it, and where it comes from.

`card` fills in `card.md.j2`; `provenance` reads its facts about the training from the folder of a run.
"""

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crate_mae.data.documents import read_json, read_yaml
from crate_mae.data.files import PYTHON_OBJECT
from crate_mae.drawing.measures import MEASURES
from crate_mae.drawing.templates import render
from crate_mae.errors import UserError, install_command
from crate_mae.models.checkpoints import is_checkpoint, named_checkpoint, newest_checkpoint, step_of
from crate_mae.models.config import CONFIG_FILE, ClassifierConfig, Config, encoder_config
from crate_mae.models.presets import bundled_folder, list_bundled
from crate_mae.models.weights import is_untrained

ABOUT = "training.md"  # in the folder of a model that is passed on without its run
LICENSE = "License"  # the heading that the Hub's own field is filled from

# Columns of metrics.csv that are results, and their number formats.
_FORMATS = {"held_out_loss": "{:.4g}", "val_loss": "{:.4g}", "val_accuracy": "{:.1%}"}
_OPTIONS = ("epochs", "steps", "batch_size", "lr", "weight_decay", "mask_ratio", "precision", "seed")
_PACKAGES = ("crate-mae", "torch", "timm")
_PUBLIC = ("hf:", "torchvision:", "timm:")  # names that open the same everywhere


def card(
    config: Config,
    kind: str,
    part: str,
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    facts: Mapping[str, str],
    note: str = "",
) -> str:
    """The text of `README.md`.

    Args:
        config: of what was exported.
        kind: the files: "safetensors", "torch", "timm", "hf", "onnx" or "pt2".
        part: "encoder" or "full".
        inputs: names of what goes in.
        outputs: names of what comes out.
        facts: where it comes from, by heading; see `provenance`.
        note: anything else about the files.
    """
    whole = "classifier" if isinstance(config, ClassifierConfig) else "autoencoder"
    text = render(
        "deployment/card.md.j2",
        config=config,
        encoder=encoder_config(config),
        form="encoder" if part == "encoder" else whole,
        kind=kind,
        part=part,
        inputs=inputs,
        outputs=outputs,
        facts=facts,
        license=facts.get(LICENSE),
        note=note,
        install=install_command(public=True),
    )
    return text.rstrip() + "\n"


def provenance(model: Any) -> dict[str, str]:
    """What is known about a model's training, by heading: data, recipe, results, environment.

    Args:
        model: any form of MODEL. Only the folder of a run, one of its checkpoints, a folder with `training.md` (that
            of a bundled model has one), and the name of a random initialisation have such facts.
    """
    if not isinstance(model, (str, Path)):
        return {}
    if is_untrained(str(model)):
        return {"Training": "None: the weights are a random initialisation."}
    folder = run = bundled_folder(str(model)) if str(model) in list_bundled() else Path(model).absolute()
    if (folder / ABOUT).is_file():
        about = (folder / ABOUT).read_text(encoding="utf-8").strip()
        return {"Training": about} | ({LICENSE: "mit"} if "Licence of the weights: MIT" in about else {})
    if is_checkpoint(folder):
        run = folder.parent.parent
    if not (options := _mapping(run / "config.yaml")):
        return {}
    if run == folder:
        results = [*_measured(run, _exported_step(run, options)), *_probed(run)]
    else:
        results = [*_measured(run, step_of(folder))]
    facts = {
        "Data": _data(options),
        "Recipe": _recipe(options),
        "Results": "\n".join(f"- {line}" for line in results),
        "Environment": _environment(run),
    }
    return {heading: text for heading, text in facts.items() if text}


def _data(options: Mapping[str, Any]) -> str:
    parts = {"train": "", "data": "", "val": "measured on "}
    return "; ".join(words + _public(options[key]) for key, words in parts.items() if options.get(key) is not None)


def _recipe(options: Mapping[str, Any]) -> str:
    start = (
        f"`crate-mae {options.get('command', 'pretrain')}` of `{_public(options.get('model', 'a model of its own'))}`"
    )
    if options.get("init_from"):
        start += f", starting from `{_public(options['init_from'])}`"
    return ", ".join([start, *(f"{key} {options[key]}" for key in _OPTIONS if options.get(key) is not None)]) + "."


def _measured(folder: Path, step: int | None) -> Iterator[str]:
    """Results on held-out images, first and of the step whose weights are exported (None: the last)."""
    try:
        with (folder / "metrics.csv").open(encoding="utf-8-sig", newline="") as file:  # spreadsheets add a mark
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return
    for column, form in _FORMATS.items():
        cells = [(_number(row.get("step")), _number(row.get(column))) for row in rows]
        values = [(int(at), value) for at, value in cells if at is not None and value is not None]
        kept = [(at, value) for at, value in values if step is None or at <= step]
        if kept:
            (first, before), (last, after) = values[0], kept[-1]
            title = MEASURES[column].title.capitalize()
            yield f"{title}: {form.format(before)} at step {first}, {form.format(after)} at step {last}."


def _number(cell: str | None) -> float | None:
    """A number of a table; None for an empty or damaged cell: a card must not make an export fail."""
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _exported_step(folder: Path, options: Mapping[str, Any]) -> int | None:
    """The step of the weights that a run has to give: the best or last one; of an unfinished run, the newest saved."""
    if not (folder / CONFIG_FILE).exists():
        newest = newest_checkpoint(folder)
        return None if newest is None else step_of(newest)
    best = named_checkpoint(folder, "best") if options.get("command") == "finetune" else None
    return None if best is None else step_of(best)


def _probed(folder: Path) -> Iterator[str]:
    """Results of `crate-mae eval ... --out` in the folder."""
    for file in sorted(folder.glob("*.json")):
        found = _mapping(file)
        for result in (found.get("results") or []) if "probe" in found else []:
            if isinstance(top1 := result.get("top1"), dict) and isinstance(top1.get("value"), float):
                images = f"{found.get('val_images', 0):,} images of {_public(found.get('val', ''))}"
                yield f"{found['probe']} probe, layer {result.get('layer')}: {top1['value']:.1%} of {images}."


def _environment(folder: Path) -> str:
    found = _mapping(folder / "environment.json")
    versions = found.get("packages") or {}
    packages = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    devices = found.get("gpus") or [found.get("processor")]
    return ", ".join([*packages, *(str(device) for device in devices if device)])


def _mapping(file: Path) -> dict[str, Any]:
    """A file of YAML or JSON that holds a mapping; else an empty one, since a card must not make an export fail."""
    try:
        found = read_json(file) if file.suffix == ".json" else read_yaml(file)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _public(data: Any) -> str:
    """The name of data or of a model without its folders: a card is public, and they are private."""
    name = str(data)
    if name.startswith(PYTHON_OBJECT):
        return "images that were given as a Python object, which has no name"
    return name if name.startswith(_PUBLIC) else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
