"""Costs of a training step: time, operations and memory."""
