"""Signals, and what travels between processes, counted."""

import signal
import subprocess
import sys
import time

import pytest

from crate_mae.training.processes import stop_requests


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_launcher_passes_on_is_no_second_one(number, monkeypatch, capfd):
    with stop_requests(announce=True) as request:
        for _ in range(3):
            signal.raise_signal(number)
        assert request.signal == number
        answer = "Stopping after this step, and saving. Again: stop at once, and lose what is not saved."
        assert capfd.readouterr().err.split("\n") == ["", answer, ""]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert capfd.readouterr().err.strip() == "Stopped: the steps since the last checkpoint are lost."


# One process of two, the other one a fiction: PyTorch's fake communication, in which every operation is done at once.
REDUCTIONS = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")
os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import patch_environment
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from crate_mae.models import create_model
from crate_mae.training.model_state import asked_sharding, shard, synchronizing
from crate_mae.training.start import WHOLE_MODELS

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
with patch_environment(accelerate_use_fsdp="false"):
    accelerator = Accelerator(cpu=True)
counted = []

def build():
    sizes = {"embed_dim": 24, "num_heads": 2, "depth": 2, "decoder_depth": 2}
    return create_model("crate_mae_nano_patch2_8", in_chans=1, **sizes).train()

def whole():
    def count(_state, bucket):
        counted.append(bucket)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(build(), init_sync=False, **WHOLE_MODELS.to_kwargs())
    model.register_comm_hook(None, count)
    return model

def sharded():
    model = build()
    shard(model, accelerator, asked_sharding())
    return model

name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
scatter = getattr(dist, name)
dist._broadcast_coalesced = lambda *args, **options: counted.append(args)  # of buffers
setattr(dist, name, lambda *args, **options: counted.append(args) or scatter(*args, **options))
for make in (whole, sharded):
    for accumulation in (1, 3):
        model = make()
        counted.clear()
        for number in range(1, accumulation + 1):
            with synchronizing(accelerator, model, last=number == accumulation):
                model(torch.randn(2, 1, 8, 8)).loss.backward()
        print(make.__name__, len(counted))
dist.destroy_process_group()
"""


def test_gradients_travel_once_a_step_however_many_micro_batches_it_has():
    done = subprocess.run([sys.executable, "-c", REDUCTIONS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, three, sharded_one, sharded_three = done.stdout.splitlines()
    assert one == three == "whole 1"
    assert sharded_one == sharded_three == "sharded 5"  # the four layers, and what is besides


def test_processes_import_only_what_they_need():
    """Loaders of images import `training.processes`; all processes of a run import `start`, and one of them draws."""
    code = "import sys\n" + "\n".join(
        f"import crate_mae.training.{module}; print(sorted({unwanted} & set(sys.modules)))"
        for module, unwanted in (("processes", {"timm", "cyclopts", "rich", "matplotlib"}), ("start", {"matplotlib"}))
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n" * 2
