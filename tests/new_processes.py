"""Programs that begin with PyTorch imported, which takes most of their time, and with nothing of what is tested."""

import subprocess
import sys

_FORKS = """
import os, sys, traceback, warnings
import torch, torch._dynamo, torchvision

assert not {"timm", "transformers", "crate_mae"} & set(sys.modules)
failed = []
for program in sys.argv[1:]:
    with warnings.catch_warnings(action="ignore"):  # of forks
        child = os.fork()
    if child == 0:
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(program)
print(*failed, sep="\\n", end="")
"""


def failing(programs: list[str], warnings: str = "error") -> str:
    """Run programs, each in a process of its own; "" if none fails, else those that fail, and their errors."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", _FORKS, *programs], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 and not done.stdout else done.stdout + done.stderr
