"""Where the tests of a GPU run: on CUDA, or as a rehearsal on the CPU; elsewhere they are skipped."""

import os

import pytest
import torch

REHEARSAL = "CRATE_MAE_GPU_REHEARSAL"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA; `CRATE_MAE_GPU_REHEARSAL=cpu` runs the same code on the CPU, except for what only CUDA can check."""
    if os.environ.get(REHEARSAL) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"there is no CUDA GPU on this machine; {REHEARSAL}=cpu rehearses the tests on the CPU")
    return torch.device("cuda")
