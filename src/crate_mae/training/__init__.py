"""The pretraining loop on Accelerate, and what it needs: schedules, order, checkpoints, the run directory."""
