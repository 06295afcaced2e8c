"""Trained models for use elsewhere: folded for inference, as graphs (ONNX, torch.export) or folders, and verified."""

from typing import Literal

Format = Literal["safetensors", "torch", "timm", "hf", "onnx", "pt2"]
