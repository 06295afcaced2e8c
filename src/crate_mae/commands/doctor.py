"""`crate-mae doctor`: the facts about a machine that a bug report needs."""

from pathlib import Path


def doctor() -> dict[str, str]:
    """Describe this machine and installation for a bug report: versions, devices, speed, threads, disk.

    Matrix products are timed for about a second. Nothing is sent anywhere.

    Returns:
        The rows of the table, by name.
    """
    import os
    import platform
    import shutil
    import sys
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from rich.table import Table

    from crate_mae.terminal import open_console

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    mps = torch.backends.mps.is_available()
    facts = {
        "crate-mae": installed("crate-mae"),
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        **{package: installed(package) for package in ("torch", "torchvision", "timm", "accelerate", "numpy")},
        **{f"{package} (optional)": installed(package) for package in ("datasets", "tensorboard", "wandb")},
        "GPU": ", ".join(cuda) or ("Apple MPS" if mps else "none"),
        "CPU": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "float32 products": f"{_gflops('float32'):.0f} GFLOP/s on the CPU",
        "bfloat16 products": f"{_gflops('bfloat16'):.0f} GFLOP/s on the CPU",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
    }
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    open_console().print(table)
    return facts


def _gflops(dtype_name: str, size: int = 512) -> float:
    """Measure the speed of square matrix products: the median of timed runs.

    Even processors without instructions for bfloat16 multiply matrices of this size within a second.
    """
    import torch
    from torch.utils.benchmark import Timer

    a = torch.randn(size, size).to(getattr(torch, dtype_name))
    threads = torch.get_num_threads()
    timed = Timer("a @ a", globals={"a": a}, num_threads=threads).blocked_autorange(min_run_time=0.3)
    return 2 * size**3 / timed.median / 1e9
