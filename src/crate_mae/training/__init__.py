"""Pretraining and fine-tuning on Accelerate: options, images, the loop, checkpoints, the run's folder."""
