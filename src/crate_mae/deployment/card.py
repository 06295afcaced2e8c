"""`README.md` of an exported folder: what goes in, what comes out, how to run it, and where it comes from.

`card` writes the text; `provenance` reads what it says about the training from the folder of a run.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crate_mae.data.documents import read_json, read_yaml
from crate_mae.errors import UserError, install_command
from crate_mae.models.checkpoints import newest_checkpoint, step_of
from crate_mae.models.classifier import ClassifierConfig
from crate_mae.models.config import ModelConfig
from crate_mae.models.description import Config
from crate_mae.models.presets import bundled_folder, list_bundled
from crate_mae.models.weights import CONFIG_FILE

LICENSE = "License"  # the heading that the Hub's own field is filled from

# Columns of metrics.csv: their names in the card, and their number formats.
_MEASURES = {
    "held_out_loss": ("Loss on held-out images", "{:.4g}"),
    "val_loss": ("Loss on validation images", "{:.4g}"),
    "val_accuracy": ("Accuracy on validation images", "{:.1%}"),
}
_OPTIONS = ("epochs", "steps", "batch_size", "lr", "weight_decay", "mask_ratio", "precision", "seed")
_PACKAGES = ("crate-mae", "torch", "timm")
_PYTHON_OBJECT = "python:"  # in a configuration; see `training.images`
_PUBLIC = ("hf:", "torchvision:", "timm:")  # names that open the same everywhere

_RUN = {
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
{outputs} = session.run(None, {{{feed}}})""",
    "pt2": """import torch
program = torch.export.load("model.pt2").module()
{outputs} = program({keywords})""",
    "timm": """import crate_mae, timm  # importing crate_mae registers the models with timm
encoder = timm.create_model("local-dir:.", pretrained=True).eval()
tokens = encoder.forward_features(images)

import transformers
model = transformers.AutoModel.from_pretrained(".")  # the same encoder, in transformers""",
    "hf": """import crate_mae  # or, without this library, trust_remote_code=True wherever from_pretrained is called
from transformers import AutoImageProcessor, {classes}
processor = AutoImageProcessor.from_pretrained(".")
model = {class_}.from_pretrained(".")
inputs = processor(image, return_tensors="pt")  # a Pillow image, or a list of them
output = model(**inputs{options})
{outputs}""",
    "safetensors": """import crate_mae
model = crate_mae.load(".")""",
}
_CLASSES = {
    "encoder": "AutoModel",
    "autoencoder": "AutoModelForPreTraining",
    "classifier": "AutoModelForImageClassification",
}
_READ = {
    "encoder": "features = output.pooler_output",
    "autoencoder": "prediction = output.logits",
    "classifier": "classes = [model.config.id2label[int(i)] for i in output.logits.argmax(dim=1)]",
}


def card(
    config: Config,
    kind: str,
    part: str,
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    facts: Mapping[str, str] | None = None,
    note: str = "",
) -> str:
    """The text of `README.md`.

    Args:
        config: of what was exported.
        kind: the files: "safetensors", "timm", "hf", "onnx" or "pt2".
        part: "encoder" or "full".
        inputs: names of what goes in.
        outputs: names of what comes out.
        facts: where it comes from, by heading; see `provenance`.
        note: anything else about the files.
    """
    facts = facts or {}
    lines = [
        *_front_matter(what(config, part), kind, facts.get(LICENSE)),
        f"# {config.name}, {'its encoder' if part == 'encoder' else 'whole'}",
        "",
        "CRATE-MAE, the white-box masked autoencoder (arXiv:2404.02446), by the library crate-mae"
        f" ({_installed()}). Written by `crate-mae export --format {kind} --part {part}`.",
        "",
        "```python",
        _code(config, kind, part, inputs, outputs),
        "```",
        "",
        *_inputs(config, kind, part, inputs),
        *_outputs(config, outputs),
    ]
    if note:
        lines += [note, ""]
    for heading, text in facts.items():
        lines += [f"## {heading}", "", text, ""]
    return "\n".join(lines)


def _installed() -> str:
    """How a reader of the card installs the library."""
    command = install_command(public=True)
    return f"`{command}`" + (" in the folder of its source" if command.endswith(" .") else "")


def what(config: Config, part: str) -> str:
    """What is exported: "encoder", "autoencoder" or "classifier"."""
    if part == "encoder":
        return "encoder"
    return "classifier" if isinstance(config, ClassifierConfig) else "autoencoder"


def _front_matter(form: str, kind: str, license_: str | None) -> list[str]:
    """The header that the Hugging Face Hub reads. The licence is for the trainer of the model to choose: no default."""
    library = {"timm": "timm", "hf": "transformers"}.get(kind, "crate-mae")
    task = "image-classification" if form == "classifier" else "image-feature-extraction"
    licensed = [f"license: {license_}"] if license_ else []
    tags = ["tags:", "- crate-mae", "- masked-autoencoder", "- white-box"]
    return ["---", f"library_name: {library}", f"pipeline_tag: {task}", *licensed, *tags, "---", ""]


def _code(config: Config, kind: str, part: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str:
    form = what(config, part)
    if kind == "hf":
        options = ", mask_ratio=0.75" if form == "autoencoder" else ""
        name = _CLASSES[form]
        return _RUN[kind].format(classes=name, class_=name, options=options, outputs=_READ[form])
    return _RUN[kind].format(
        outputs=", ".join(outputs) + ("," if kind == "onnx" and len(outputs) == 1 else ""),
        feed=", ".join(f'"{name}": {name}' for name in inputs),
        keywords=", ".join(f"{name}={name}" for name in inputs),
    )


def _inputs(config: Config, kind: str, part: str, inputs: tuple[str, ...]) -> list[str]:
    hh, ww = config.image_size
    name = "pixel_values" if kind == "hf" else "images"
    lines = [
        "## In",
        "",
        f"- `{name}`: float32, batch x {config.in_chans} x {hh} x {ww}, pixels in",
        f"  [0, 1] less mean {_numbers(config.mean)}, divided by std {_numbers(config.std)}, channel by channel.",
        "  Images were scaled to cover that size (bicubic) and centre-cropped.",
    ]
    if kind in ("onnx", "pt2", "hf") and what(config, part) != "autoencoder":
        lines.append(f"  Other sizes in whole patches of {_encoder_config(config).patch_size} pixels are taken too.")
    if kind == "hf":
        return [*lines, ""]
    if "mask" in inputs:
        lines.append("- `mask`: bool, batch x patches, true = hidden, row by row.")
    if "visible" in inputs:
        lines.append("- `visible`: int64, batch x patches that are left, their numbers from 0, row by row.")
    return [*lines, ""]


def _outputs(config: Config, outputs: tuple[str, ...]) -> list[str]:
    classes = ", ".join(config.classes) if isinstance(config, ClassifierConfig) else ""
    if not outputs:
        return []
    texts = {
        "tokens": "normalised features of the class token, then of every patch, row by row.",
        "embedding": "the class token and the mean of the patches, concatenated, as in `crate-mae embed`.",
        "logits": f"of the classes {classes}.",
        "prediction": "batch x patches x numbers: pixels of every patch, row by row, channels last.",
    }
    lines = ["## Out", "", *(f"- `{name}`: {texts[name]}" for name in outputs)]
    if "prediction" in outputs:
        lines += _units(_encoder_config(config))
    return [*lines, ""]


def _units(config: ModelConfig) -> list[str]:
    if not config.norm_pix_loss:
        return ["  They are normalised as the images are."]
    return [
        "  They are in units of each patch's own mean and standard deviation: sqrt(var + 1e-6), var unbiased.",
        "  For pixels, multiply by that of the original patch and add its mean; only then are they normalised as the",
        "  images are.",
    ]


def _encoder_config(config: Config) -> ModelConfig:
    return config.encoder if isinstance(config, ClassifierConfig) else config


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def provenance(model: Any) -> dict[str, str]:
    """What is known about a model's training, by heading: data, recipe, results, environment.

    Args:
        model: any form of MODEL. Only the folder of a run and a bundled model have such facts.
    """
    if str(model) in list_bundled():
        text = (bundled_folder(str(model)) / "README.md").read_text(encoding="utf-8")
        about = text.partition("\n\n")[2].partition("\n\n")[2].strip()  # below its title and its code
        return {"Training": about, LICENSE: "mit"}
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is None or not (options := _mapping(folder / "config.yaml")):
        return {}
    facts = {
        "Data": _data(options),
        "Recipe": _recipe(options),
        "Results": "\n".join(f"- {line}" for line in (*_measured(folder, options), *_probed(folder))),
        "Environment": _environment(folder),
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


def _measured(folder: Path, options: Mapping[str, Any]) -> Iterator[str]:
    """Results on held-out images, first and of the step whose weights are exported."""
    try:
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return
    step = _exported_step(folder, options)
    for column, (name, form) in _MEASURES.items():
        values = [(row["step"], float(row[column])) for row in rows if row.get(column)]
        kept = [(at, value) for at, value in values if step is None or int(at) <= step]
        if kept:
            (first, before), (last, after) = values[0], kept[-1]
            yield f"{name}: {form.format(before)} at step {first}, {form.format(after)} at step {last}."


def _exported_step(folder: Path, options: Mapping[str, Any]) -> int | None:
    """The step of the weights that a run has to give: the best or last one; of an unfinished run, the newest saved."""
    if not (folder / CONFIG_FILE).exists():
        newest = newest_checkpoint(folder)
        return None if newest is None else step_of(newest)
    best = folder / "checkpoints" / "best"
    if options.get("command") == "finetune" and best.is_file():
        return int(best.read_text(encoding="utf-8").strip().rpartition("-")[2])
    return None


def _probed(folder: Path) -> Iterator[str]:
    """Results of `crate-mae eval ... --out` in the folder."""
    for file in sorted(folder.glob("*.json")):
        found = _mapping(file)
        for result in found.get("results", []) if "probe" in found else []:
            if isinstance(top1 := result.get("top1"), dict):
                images = f"{found.get('val_images', 0):,} images of {_public(found.get('val', ''))}"
                yield f"{found['probe']} probe, layer {result.get('layer')}: {top1['value']:.1%} of {images}."


def _environment(folder: Path) -> str:
    found = _mapping(folder / "environment.json")
    packages = [f"{name} {found['packages'][name]}" for name in _PACKAGES if name in found.get("packages", {})]
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
    if name.startswith(_PYTHON_OBJECT):
        return "images that were given as a Python object, which has no name"
    return name if name.startswith(_PUBLIC) else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
