"""Trained models for use elsewhere: folded for inference, as graphs (ONNX, torch.export) or folders, and verified."""
