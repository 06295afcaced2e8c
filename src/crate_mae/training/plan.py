"""What a run is going to do, in at most 15 lines, and what to do after it."""

from __future__ import annotations

from crate_mae.training.logbook import Logbook
from crate_mae.training.pretrain import Setup
from crate_mae.training.probe import ProbeResult
from crate_mae.training.progress import duration
from crate_mae.training.run import Run
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.schedule import scaled_lr
