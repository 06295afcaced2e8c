"""`crate-mae models`, `recipes` and `doctor`: what there is to choose from, and what it runs on."""

import os
import platform
import shutil
import sys
from pathlib import Path

from rich.table import Table

from crate_mae.drawing.text import plural
from crate_mae.errors import installed_version
from crate_mae.terminal import open_console

_NEEDED = ("torch", "torchvision", "timm", "accelerate", "numpy")
_OPTIONAL = (
    "datasets",
    "gradio",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pillow-heif",
    "tensorboard",
    "transformers",
    "wandb",
)


def models() -> list[str]:
    """List the names and sizes of models, and the trained models that come with the library.

    Only trainable parameters are counted. Published counts of CRATE-MAE also include fixed position embeddings, and a
    layer of the official code that is never called.

    Returns:
        The names of all presets, which are not trained.
    """
    from crate_mae.models import list_models
    from crate_mae.models.autoencoder import build_without_memory
    from crate_mae.models.presets import list_bundled, preset

    names = list_models()
    table = Table(box=None)
    table.add_column("model", no_wrap=True, min_width=max(map(len, names)))
    for title in ("size", "image / patch", "width", "heads", "layers"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names:
        c = preset(name)
        parameters = sum(parameter.numel() for parameter in build_without_memory(c).parameters())
        table.add_row(
            name,
            f"{parameters / 1e6:.2f} M",
            f"{c.image_size[0]} x {c.image_size[1]} / {c.patch_size}",
            str(c.embed_dim),
            str(c.num_heads),
            f"{c.depth} + {c.decoder_depth}",
        )
    # In a narrow terminal, or a pipe, lines wrap instead of losing numbers.
    console = open_console(width=max(open_console().width, 100))
    console.print(table)
    console.print_text(f"Trained, and in the package: {', '.join(list_bundled())}")
    console.print_text("More trained models: the folders of trained_models/ in the project's repository.")
    return names


def recipes(name: str | None = None) -> list[str]:
    """List the recipes that `crate-mae pretrain --recipe` takes, or print one with its results.

    Args:
        name: A recipe, to print its options, the images it was tested on, its results and its duration.

    Returns:
        The names of all recipes.

    Raises:
        UserError: for an unknown name.
    """
    from crate_mae.training.recipes import list_recipes, read_recipe, recipe_text

    console = open_console()
    if name is not None:
        console.print_text(recipe_text(name).rstrip("\n"))
    else:
        table = Table("recipe", "for", box=None)
        for known in list_recipes():
            table.add_row(known, read_recipe(known).description)
        console.print(table)
        console.print_text("Print one completely: crate-mae recipes NAME")
    return list_recipes()


def doctor() -> dict[str, str]:
    """Describe this machine and installation for a bug report: versions, devices, speed, threads, disk.

    Matrix products are timed for about a second. Nothing is sent anywhere.

    Returns:
        The rows of the table, by name.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = [torch.cuda.get_device_name(i) for i in range(count)]
    mps = torch.backends.mps.is_available()
    versions = {name: installed_version(name) or "not installed" for name in ("crate-mae", *_NEEDED, *_OPTIONAL)}
    facts = {
        "crate-mae": versions["crate-mae"],
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        **{package: versions[package] for package in _NEEDED},
        **{f"{package} (optional)": versions[package] for package in _OPTIONAL},
        "GPU": ", ".join(cuda) or ("Apple MPS" if mps else "none"),
        "CPU": f"{os.cpu_count()} cores, torch uses {plural(torch.get_num_threads(), 'thread')}",
        "float32 products": f"{_gflops('float32'):.0f} GFLOP/s on the CPU",
        "bfloat16 products": f"{_gflops('bfloat16'):.0f} GFLOP/s on the CPU",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
    }
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    open_console().print(table)
    return facts


def _gflops(dtype_name: str) -> float:
    """Measure the speed of square matrix products: the median of timed runs."""
    import torch
    from torch.utils.benchmark import Timer

    size = 512  # also without instructions for bfloat16, a processor multiplies such matrices within a second
    a = torch.randn(size, size).to(getattr(torch, dtype_name))
    threads = torch.get_num_threads()
    timed = Timer("a @ a", globals={"a": a}, num_threads=threads).blocked_autorange(min_run_time=0.3)
    return 2 * size**3 / timed.median / 1e9
