"""Parts of pages that are generated from the tree: results with their commands, and the reference by module."""

import csv
import dataclasses
import importlib
import json
import re
from pathlib import Path

import torch

from crate_mae.errors import and_more
from crate_mae.models.presets import create_model, list_models
from crate_mae.models.weights import load_autoencoder

# Trained models, as a command takes them in the project's folder, and the results of the run that each is from.
TRAINED_MODELS = {
    "trained_models/crate_mae_micro_cifar10": "cifar10_small_color",
    "trained_models/crate_mae_micro_compressing_cifar10": "cifar10_compressing",
    "crate_mae_micro_monotone_cifar10": "cifar10_monotone",
}

# A page of the reference: its title, and the folders of `src/crate_mae/` that it is made of.
REFERENCE = {
    "theory": "Theory: one equation, one function",
    "models": "Models",
    "data": "Data",
    "training": "Training",
    "evaluation": "Evaluation",
    "costs": "Costs",
    "comparison": "Comparison",
    "interpret": "Interpretability",
    "deployment": "Deployment",
    "drawing": "Drawing",
    "app": "App",
    "commands": "Commands, from Python and from the shell",
}


def reference_pages(root: Path) -> dict[str, str]:
    """The pages of the reference: a package each, its modules in the order of the package's folder."""
    source = root / "src" / "crate_mae"
    pages = {}
    for package, title in REFERENCE.items():
        if (source / package / "__init__.py").is_file():
            modules = [path for path in sorted((source / package).rglob("*.py")) if _is_documented(path)]
            pages[f"reference/{package}.md"] = f"# {title}\n\n" + "\n".join(
                _entry(path, source.parent) for path in modules
            )
    return pages


def _entry(path: Path, source: Path) -> str:
    """A module, or of a folder what it says of itself: what it exports is described in the modules it is from."""
    name = ".".join(path.relative_to(source).with_suffix("").parts)
    if path.name == "__init__.py":
        return f"::: {name.removesuffix('.__init__')}\n    options:\n      members: false\n"
    return f"::: {name}\n{_options(name, path)}"


def _options(name: str, path: Path) -> str:
    """A table of the options of each command that takes a dataclass of them, which its signature does not show."""
    return "".join(
        _options_of(getattr(importlib.import_module(name), kind), command)
        for kind, command in re.findall(r"^@takes\((\w+)\)\ndef (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


def _options_of(kind: type, command: str) -> str:
    rows = [
        f"| `{field.name}` | {_default(field)} | {field.metadata['help']} |"
        for field in dataclasses.fields(kind)
        if "help" in field.metadata
    ]
    head = f"\nOptions of `{command}`; None is chosen from the data and the machine.\n"
    return "\n".join([head, "| option | default | |", "|---|---|---|", *rows, ""])


def _default(field: dataclasses.Field) -> str:
    return "required" if field.default is dataclasses.MISSING else f"`{field.default}`"


def _is_documented(path: Path) -> bool:
    """Whether a module says more than one line, or defines anything; folders' `__init__` often do not."""
    if path.name.startswith("_") and path.name != "__init__.py":
        return False
    text = path.read_text(encoding="utf-8")
    return path.name != "__init__.py" or len(text.splitlines()) > 2


def results(root: Path) -> str:
    """Every folder of results: what it is, the command that makes it again, and the files beside its page."""
    parts = []
    for folder in [*sorted((root / "results").iterdir()), root / "benchmarks"]:
        readme = folder / "README.md"
        if readme.is_file():
            text = readme.read_text(encoding="utf-8")
            title = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
            assert title is not None, f"{readme} has no title"
            parts.append(
                f"### [{title[1]}](../{readme.relative_to(root).as_posix()})\n\n{_command(text)}{_beside(folder)}"
            )
    return "\n\n".join(parts)


def _command(text: str) -> str:
    """The first command of a page, as it stands there."""
    start = r"(?:crate-mae|\S*python\S* -m|accelerate|torchrun) "
    found = re.search(rf"^(?:    )?({start}(?:[^\n]*\\\n)*[^\n]*)$", text, flags=re.MULTILINE)
    if found is None:
        return "The page says how to reproduce it.\n"
    lines = [line.strip() for line in found[1].splitlines()]
    return "```text\n" + "\n    ".join(lines) + "\n```\n"


def _beside(folder: Path) -> str:
    """The tables and reports of a folder, a few by their names."""
    names = sorted(path.name for path in folder.rglob("*") if path.suffix in {".json", ".csv", ".yaml", ".html"})
    return f"\nBeside it: {and_more([f'`{name}`' for name in names], 6)}." if names else ""


def minutes(root: Path) -> str:
    """The scores of models that had the same 20 minutes each, from the file that the comparison wrote."""
    scores = json.loads((root / "results" / "cifar10_normalised" / "scores.json").read_text(encoding="utf-8"))
    rows = ["| model | linear probe | k-NN | PSNR of hidden patches |", "|---|---|---|---|"]
    for name, score in scores.items():
        model, _, kind = name.partition("/")
        label = f"`{model}`" + (", untrained" if kind.startswith("random") else "")
        psnr = f"{score['psnr']:.1f} dB" if "psnr" in score else ""
        rows.append(f"| {label} | {score['linear']:.1%} | {score['knn']:.1%} | {psnr} |")
    return "\n".join(rows)


def trained(root: Path) -> str:
    """The trained models of the package and the repository, and what their runs and probes wrote."""
    rows = ["| model | parameters | held-out loss | linear probe, 50,000 labels | results |", "|---|---|---|---|---|"]
    for model, folder in TRAINED_MODELS.items():
        with (root / "results" / folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            loss = [float(row["held_out_loss"]) for row in csv.DictReader(file) if row["held_out_loss"]][-1]
        probe = json.loads((root / "results" / folder / "linear.json").read_text(encoding="utf-8"))
        top1 = probe["results"][-1]["top1"]
        loaded = load_autoencoder(root / model if "/" in model else model)
        rows.append(
            f"| `{model}` | {_millions(loaded)} | {loss:.3f} | {_percent(top1['value'])} "
            f"({100 * top1['low']:.1f} to {100 * top1['high']:.1f}) | [{folder}](../results/{folder}/README.md) |"
        )
    return "\n".join(rows)


def budgets(root: Path) -> str:
    """The accuracy of models in comparisons under one budget, from the files that the comparisons wrote."""
    rows = [
        "| comparison | model | parameters | linear probe | the same, untrained | PSNR of hidden patches |",
        "|---|---|---|---|---|---|",
    ]
    for folder in ("cifar10_steps", "cifar10_minutes", "cifar10_normalised"):
        scores = json.loads((root / "results" / folder / "scores.json").read_text(encoding="utf-8"))
        for key in (key for key in scores if key.endswith("/seed-0")):
            name = key.removesuffix("/seed-0")
            untrained = scores.get(f"{name}/random-0")
            control = _percent(untrained["linear"]) if untrained else "not measured"
            rows.append(
                f"| [{folder}](../results/{folder}/README.md) | `{name}` | {_millions(create_model(name))} | "
                f"{_percent(scores[key]['linear'])} | {control} | {scores[key]['psnr']:.1f} dB |"
            )
    return "\n".join(rows)


def presets(_: Path) -> str:
    """Every model that can be trained, with its size."""
    rows = [
        "| model | parameters | encoder | pixels / patch | width | heads | layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        c = model.config
        rows.append(
            f"| `{name}` | {_millions(model)} | {_millions(model.encoder)} | {c.image_size[0]} / {c.patch_size} | "
            f"{c.embed_dim} | {c.num_heads} | {c.depth} + {c.decoder_depth} |"
        )
    return "\n".join(rows)


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(each.numel() for each in model.parameters()) / 1e6:.2f} M"


def _percent(share: float) -> str:
    return f"{100 * share + 1e-9:.1f}%"  # halves are rounded up, as on the pages of the results


PARTS = {"results": results, "minutes": minutes, "trained": trained, "budgets": budgets, "presets": presets}
