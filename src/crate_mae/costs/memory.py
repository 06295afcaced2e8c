"""Memory of a training step, in a process of its own: `python -m crate_mae.costs.memory` with JSON on its input.

What a process has taken, it seldom gives back, so contestants measured one after another in one process would look
alike. The peak is that of resident memory above what the process has after its imports; on a GPU, that of its tensors.
"""

import json
import subprocess
import sys
from typing import Any

import torch

from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.models.config import ModelConfig, config_from_dict
from crate_mae.training.resident import peak_memory, restart_peak

_STEPS = 3  # AdamW has all its memory after the first


def step_memory(config: ModelConfig, settings: StepSettings, device: torch.device, threads: int) -> int | None:
    """Bytes at the peak of a training step; None where it cannot be measured, or there is too little memory."""
    question = {
        "config": config.to_dict(),
        "settings": vars(settings),
        "device": str(device),
        "threads": threads,
    }
    answer = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def main() -> None:
    """Answer the question on standard input with a number, or null, on standard output."""
    question: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(question["threads"])
    device = torch.device(question["device"])
    config, settings = config_from_dict(question["config"]), StepSettings(**question["settings"])
    before = restart_peak()
    step = TrialStep(config, settings, device)
    for _ in range(_STEPS):
        step()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        after = peak_memory()
        peak = None if before is None or after is None else after - before
    sys.stdout.write(json.dumps(peak))


if __name__ == "__main__":
    main()
